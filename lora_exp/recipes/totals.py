"""Sums that Trainer keeps between log lines and for its summary, carried through a checkpoint.

Trainer saves weights, optimiser, schedule and random states, and begins its sums anew: after a resume the next log line
averages fewer steps, tokens are counted from zero, and the summary tells of a part of the run as if it were the whole.
Read in transformers 5.23, `trainer.py`, and trl 1.16.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class Totals(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Puts the sums into `trainer_state.json` with each checkpoint, and back where a run goes on from one.

    Args:
        trainer: A TRL trainer that has `CarriedTotals` mixed in.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seconds_before = 0.0
        self.began = time.time()
        self.began_at = 0
        """The step of the checkpoint that the run goes on from."""
        self.due: list[str] = []
        """What the step of the checkpoint has not got to: `evaluation`, and `save` where one was to follow."""
        self.ended: dict[str, Any] | None = None
        """The sums as they were at the end, where a checkpoint of it is written after the summary."""

    def state(self) -> dict[str, Any]:
        """Return the sums as JSON keeps them; a float comes back bit for bit."""
        if self.ended is not None:
            return {"args": {}, "attributes": self.ended}
        trainer = self.trainer
        sums = {
            "seconds": self.seconds_before + time.time() - self.began,
            "loss_since_log": float(getattr(trainer, "_tr_loss", 0.0)),
            "loss_before_log": getattr(trainer, "_total_loss_scalar", 0.0),
            "last_logged": getattr(trainer, "_globalstep_last_logged", 0),
            "tokens": float(trainer._total_train_tokens),
            "due": self.due,
            "metrics": {name: [float(value) for value in values] for name, values in trainer._metrics["train"].items()},
        }
        return {"args": {}, "attributes": sums}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the sums of the checkpoint that the run goes on from."""
        self.began = time.time()
        if state.global_step == 0:
            return
        args.eval_on_start = False  # its start is behind it
        self.began_at = state.global_step
        sums = state.stateful_callbacks[type(self).__name__]["attributes"]
        trainer = self.trainer
        self.seconds_before = sums["seconds"]
        self.due = list(sums["due"])
        trainer._tr_loss = torch.tensor(sums["loss_since_log"], device=args.device)
        trainer._total_loss_scalar = sums["loss_before_log"]
        trainer._globalstep_last_logged = sums["last_logged"]
        trainer._initial_global_step = 0
        trainer._total_train_tokens = sums["tokens"]
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(sums["metrics"])


class CarriedTotals:
    """Mixed in before a TRL trainer: after a resume it goes on as if it had not been interrupted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.totals = Totals(self)
        self.add_callback(self.totals)  # type: ignore[attr-defined]

    def _run_epoch(self, **epoch: Any) -> None:
        """Train no step beyond the last: Trainer asks whether it is done only after a step."""
        state = self.state  # type: ignore[attr-defined]
        if state.global_step < state.max_steps:
            super()._run_epoch(**epoch)  # type: ignore[misc]
            return
        self.control.should_training_stop = True  # type: ignore[attr-defined]

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Take the time of all parts of the run, as the steps are those of all parts."""
        state = self.state  # type: ignore[attr-defined]
        if 0 < self.totals.began_at == state.global_step and "eval_loss" in state.log_history[-1]:
            self.model.eval()  # type: ignore[attr-defined]  # as the evaluation left it; TRL's log asks
        start = start_time - self.totals.seconds_before
        return super()._finalize_training(trial, num_train_samples, start)  # type: ignore[misc]
