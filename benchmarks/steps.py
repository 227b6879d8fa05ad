"""A worker of `benchmarks.threads`: trains as many optimiser steps as a line of its input says, again and again.

    python -m benchmarks.steps OUTPUT_DIR OVERRIDE...

It answers each line with a line of JSON, the seconds that the steps took, and ends with its input. A few steps come
before those, in which the process notices its neighbours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lora_exp.allocator import restart_with_mimalloc

if __name__ == "__main__":
    restart_with_mimalloc()

from transformers import TrainerCallback

from lora_exp.libraries import load_libraries
from lora_exp.machine import bound_kernel_caches, keep_freed_memory
from lora_exp.process.spin import brief_spins_beside_others
from lora_exp.process.threads import use_threads
from lora_exp.quiet import quiet_libraries
from tests.runs import build_trainer, composed

UNWATCHED = "BENCHMARK_UNWATCHED"
"""The environment variable that leaves the spin as OpenMP has it."""


class OnDemand(TrainerCallback):  # type: ignore[misc]
    """Trains steps that are asked for, and waits before the next one."""

    def __init__(self) -> None:
        self.left = self.counted = 0
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the next line where no step is left."""
        if self.left:
            return
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        self.counted = int(line)
        self.left = self.counted + 1 + self.counted // 4

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count time from the first counted step on, and answer after the last."""
        self.left -= 1
        if self.left == self.counted:
            self.started = time.perf_counter()
        if not self.left:
            print(json.dumps({"seconds": time.perf_counter() - self.started}), flush=True)  # noqa: T201


def main() -> None:
    """Set up as a run does, and train on demand."""
    output_dir, *overrides = sys.argv[1:]
    quiet_libraries()
    keep_freed_memory()
    bound_kernel_caches()
    load_libraries()
    use_threads(composed(overrides).engine.num_threads)
    trainer = build_trainer(Path(output_dir), overrides)
    trainer.add_callback(OnDemand())
    with nullcontext() if os.environ.get(UNWATCHED) else brief_spins_beside_others():
        trainer.train()


if __name__ == "__main__":
    main()
