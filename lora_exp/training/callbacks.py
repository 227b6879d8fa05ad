"""What happens while the trainer trains: numbers to the run folder, the tracker and the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_exp.errors import Pruned
from lora_exp.reports.console import TrainingDisplay
from lora_exp.run_folder import to_json, write_whole
from lora_exp.search.pruning import SearchTrial
from lora_exp.tracking.base import ActiveRun


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends every logged step to `metrics.jsonl`, one line with `step` and `epoch` each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the lines that the checkpoint knows of, where a run goes on from one: the others come again."""
        if self.path.exists():
            known = [{"step": line.pop("step"), **line} for line in map(dict, state.log_history)]
            write_whole(self.path, "".join(to_json(line, indent=None) + "\n" for line in known))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        line = {"step": state.global_step, **logs}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(line, indent=None) + "\n")


class TrackerFeed(TrainerCallback):  # type: ignore[misc]
    """Hands every logged step to the tracker."""

    def __init__(self, run: ActiveRun) -> None:
        self.run = run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Hand on the numbers."""
        self.run.log({key: value for key, value in logs.items() if isinstance(value, int | float)}, state.global_step)


class Pruning(TrainerCallback):  # type: ignore[misc]
    """Reports the objective of every evaluation to the search, which may end the run.

    Args:
        trial: The run's trial.
        objective: The metric, as it is logged.
    """

    def __init__(self, trial: SearchTrial, objective: str) -> None:
        self.trial = trial
        self.objective = objective

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise `Pruned` where the trial falls behind."""
        values = [logs[self.objective] for logs in state.log_history if self.objective in logs]
        if values and self.trial.falls_behind(values[-1], len(values) - 1):
            where = f"step {state.global_step} of {state.max_steps}"
            raise Pruned(f"{self.objective} {values[-1]:.4g} at {where} falls behind the other trials")


class SaveAfterEvaluation(TrainerCallback):  # type: ignore[misc]
    """Puts the checkpoint of an epoch's last step off until the epoch's evaluation, which then is in it.

    Trainer (transformers 5.23) saves at the step and evaluates after it; a run that is killed between the two goes on
    with the next epoch, and the evaluation is lost.
    """

    def __init__(self) -> None:
        self.put_off = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take back the order to save, where an evaluation follows at once."""
        ends_epoch = state.global_step >= state.max_steps or abs(state.epoch - round(state.epoch)) < 1e-9
        if control.should_save and ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_save, self.put_off = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give it now; Trainer evaluates first."""
        control.should_save = control.should_save or self.put_off
        self.put_off = False


class Display(TrainerCallback):  # type: ignore[misc]
    """Drives the progress bar and the metrics line."""

    def __init__(self, display: TrainingDisplay) -> None:
        self.display = display

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self.display.start(state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.display.advance(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Print the metrics line."""
        self.display.metrics(state.global_step, logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        self.display.stop()
