"""What happens while the trainer trains: numbers to the run folder, the tracker and the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_exp.reports.console import TrainingDisplay
from lora_exp.run_folder import read_jsonl, to_json, write_whole
from lora_exp.tracking.base import ActiveRun


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends every logged step to `metrics.jsonl`, one line with `step` and `epoch` each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines of steps after the checkpoint that a resumed run starts from: they come again."""
        if self.path.exists():
            kept = [line for line in read_jsonl(self.path) if 0 < state.global_step >= line["step"]]
            write_whole(self.path, "".join(to_json(line, indent=None) + "\n" for line in kept))

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
