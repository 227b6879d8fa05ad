"""What happens while the trainer trains: numbers to the run folder, the tracker and the terminal."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_exp.disk import writing
from lora_exp.errors import Pruned
from lora_exp.reports.console import TrainingDisplay
from lora_exp.run_folder import to_json, write_whole
from lora_exp.search.pruning import SearchTrial
from lora_exp.tracking.base import ActiveRun
from lora_exp.training.interrupt import Interrupts
from lora_exp.training.saving import EvaluationLeft


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends every logged step to `metrics.jsonl`, one line with `step` and `epoch` each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the lines that the checkpoint knows of, where a run goes on from one: the others come again."""
        if self.path.exists():
            with writing("the metrics", self.path, self.path.parent):
                write_whole(self.path, "".join(f"{line}\n" for line in self._known(state)))

    def _known(self, state: TrainerState) -> Iterator[str]:
        """Yield the lines as they stand in the file; the checkpoint has their numbers, and another order of keys."""
        there = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        for number, logs in enumerate(state.log_history):
            line = to_json({"step": logs["step"], **logs}, indent=None)
            same = number < len(there) and json.loads(there[number]) == json.loads(line)
            yield there[number] if same else line

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        line = to_json({"step": state.global_step, **logs}, indent=None) + "\n"
        with writing("a line of the metrics", self.path, self.path.parent), self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                written = file.write(line.encode())
                if written < len(line.encode()):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)  # half a line is none
                raise


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
        if control.should_save and ends_epoch(state) and args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_save, self.put_off = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give it now; Trainer evaluates first."""
        control.should_save = control.should_save or self.put_off
        self.put_off = False


def ends_epoch(state: TrainerState) -> bool:
    """Whether the step that ended is followed by the end of its epoch."""
    return bool(state.global_step >= state.max_steps or abs(state.epoch - round(state.epoch)) < 1e-9)


class Leaving(TrainerCallback):  # type: ignore[misc]
    """Has a run that is asked to leave write a checkpoint at the end of its step, and leave.

    An evaluation that is due then is put off to the resume: it may take longer than there is time.

    Args:
        interrupts: Who asks.
        trainer: The trainer, whose checkpoint says what was put off.
    """

    def __init__(self, interrupts: Interrupts, trainer: Any) -> None:
        self.interrupts = interrupts
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save here, unless the end of the epoch follows at once."""
        self.interrupts.progress = f"step {state.global_step} of {state.max_steps}"
        if self.interrupts.asked:
            self._put_off(control)
            control.should_save = not ends_epoch(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save here."""
        if self.interrupts.asked:
            self._put_off(control)
            control.should_save = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut an evaluation short; before the first step there is nothing to save."""
        if not self.interrupts.asked:
            return
        if state.global_step == 0:
            self.interrupts.leave()
        raise EvaluationLeft

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave, with the checkpoint in its place."""
        self.interrupts.saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _put_off(self, control: TrainerControl) -> None:
        if control.should_evaluate:
            self.trainer.totals.due = ["evaluation", *(["save"] if control.should_save else [])]
            control.should_evaluate = False


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
