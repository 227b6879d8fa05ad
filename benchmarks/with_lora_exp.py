"""This project, through its own corridor."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lora_exp.process.start import start_process

if __name__ == "__main__":
    start_process()  # as `python -m lora_exp` does

from benchmarks.case import parse
from benchmarks.machine import head_parameters, parameters_multiplied
from benchmarks.measure import train_and_report
from lora_exp.machine import keep_freed_memory, reset_peak_memory
from lora_exp.process.device import choose_device
from tests.runs import build_trainer


class Operations:
    """Counts the floating-point operations of the frozen weights' products, forward and backward."""

    def __init__(self, trainer: Any) -> None:
        self.counted: list[float] = []
        scores = trainer.packed_forward.scores

        def counting(row: Any) -> Any:
            # Forward, and the gradient with regard to the inputs: two operations a weight each.
            self.counted.append(4 * (len(row.ids) * parameters_multiplied() + len(row.scored) * head_parameters()))
            return scores(row)

        trainer.packed_forward.scores = counting
        self.steps = trainer.args.max_steps

    def per_step(self) -> float:
        """Return the mean over the steps."""
        return sum(self.counted) / self.steps


def main() -> None:
    """Train one case and report."""
    case = parse()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        store = [f"store.path={folder}/reference.sqlite3", "trainer.logging_steps=1", "trainer.save_strategy=no"]
        reset_peak_memory(choose_device("auto", use_cpu=False).torch)
        trainer = build_trainer(Path(folder) / "run", [*case.overrides(Path(folder)), *store])
        operations = Operations(trainer)
        train_and_report(trainer, trainer.model.device, operations=operations.per_step)


if __name__ == "__main__":
    main()
