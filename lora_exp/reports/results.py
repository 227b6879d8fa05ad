"""A run folder, read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.errors import Problem, UserError
from lora_exp.run_folder import read_jsonl


@dataclass(frozen=True)
class RunResults:
    """What a run left in its folder.

    Args:
        folder: The run folder.
        run: `run.json`.
        metrics: `metrics.json`; empty for a run that did not finish.
        steps: The lines of `metrics.jsonl`.
    """

    folder: Path
    run: dict[str, Any]
    metrics: dict[str, float]
    steps: list[dict[str, Any]]

    @property
    def first_evaluation(self) -> dict[str, Any]:
        """The evaluation before the first step, or nothing where there was none."""
        return next((line for line in self.steps if line["step"] == 0 and "eval_loss" in line), {})


def read_results(folder: Path) -> RunResults:
    """Read a run folder.

    Raises:
        UserError: If it is none.
    """
    if not (folder / "run.json").is_file():
        raise UserError("there is nothing to report", [Problem(str(folder), "holds no run: it has no run.json")])
    metrics = folder / "metrics.json"
    return RunResults(
        folder,
        json.loads((folder / "run.json").read_text(encoding="utf-8")),
        json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else {},
        read_jsonl(folder / "metrics.jsonl"),
    )
