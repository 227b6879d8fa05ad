"""What a worker reports: seconds a step, tokens, operations, peak memory, as one line of JSON."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from transformers import TrainerCallback

from lora_exp.machine import peak_memory_bytes


class StepTimes(TrainerCallback):  # type: ignore[misc]
    """Clocks each optimiser step, from its first batch to the end of the optimiser's work."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        _wait()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        _wait()
        self.seconds.append(time.perf_counter() - self.started)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train_and_report(trainer: Any, device: torch.device, **more: Any) -> None:
    """Train, and print what was measured. The first step is left out: buffers are made in it.

    Args:
        trainer: A TRL trainer.
        device: Where it trains.
        more: Functions of no arguments that are called after training and reported under their names.
    """
    clock = StepTimes()
    trainer.add_callback(clock)
    trainer.train()
    found = {
        "seconds": clock.seconds[1:],
        "tokens": trainer._total_train_tokens / len(clock.seconds),
        "peak_bytes": peak_memory_bytes(device),
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        **{name: function() for name, function in more.items()},
    }
    print(json.dumps(found))  # noqa: T201
