"""How long a run trains: batches, steps, epochs and warm-up, counted as transformers' Trainer counts them (5.23)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_exp.config import TrainerConfig


@dataclass(frozen=True)
class Schedule:
    """What a run does in which order.

    Args:
        batch: Rows of an optimiser step.
        batches: Batches of an epoch as the data loader gives them.
        steps_per_epoch: Optimiser steps of an epoch.
        steps: Optimiser steps of the run.
        epochs: Passes over the rows.
        warmup: Steps in which the learning rate rises.
        evaluations: How often the validation rows are evaluated.
    """

    batch: int
    batches: int
    steps_per_epoch: int
    steps: int
    epochs: float
    warmup: int
    evaluations: int


def schedule(trainer: TrainerConfig, train_rows: int, has_eval_rows: bool) -> Schedule:
    """Return the schedule of a run.

    Args:
        trainer: The trainer section.
        train_rows: Rows that are left to train on.
        has_eval_rows: Whether there are rows to evaluate on.
    """
    size, accumulated = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
    whole = (trainer.model_extra or {}).get("dataloader_drop_last", False)
    batches = train_rows // size if whole else math.ceil(train_rows / size)
    per_epoch = max(math.ceil(batches / accumulated), 1)
    steps = trainer.max_steps if trainer.max_steps > 0 else math.ceil(trainer.num_train_epochs * per_epoch)
    warmup = int(trainer.warmup_steps) if trainer.warmup_steps >= 1 else math.ceil(steps * trainer.warmup_steps)
    evaluations = _evaluations(trainer, steps, per_epoch) if has_eval_rows else 0
    return Schedule(size * accumulated, batches, per_epoch, steps, steps / per_epoch, warmup, evaluations)


def _evaluations(trainer: TrainerConfig, steps: int, per_epoch: int) -> int:
    """Return how often is evaluated; at the end once more, where the last evaluation was before the last step."""
    at_start = int(trainer.eval_on_start)
    if trainer.eval_strategy == "no":
        return at_start + 1
    if trainer.eval_strategy == "epoch":
        return at_start + math.ceil(steps / per_epoch)
    assert trainer.eval_steps is not None
    every = trainer.eval_steps if trainer.eval_steps >= 1 else math.ceil(steps * trainer.eval_steps)
    return at_start + math.ceil(steps / int(every))
