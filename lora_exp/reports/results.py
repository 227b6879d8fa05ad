"""A run folder, read back."""

from __future__ import annotations

import json
from collections.abc import Callable
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
        UserError: If it is none, or its files are torn.
    """
    if not (folder / "run.json").is_file():
        raise UserError("there is nothing to report", [Problem(str(folder), "holds no run: it has no run.json")])
    metrics = folder / "metrics.json"
    return RunResults(
        folder,
        _read(folder / "run.json", json.loads),
        _read(metrics, json.loads) if metrics.exists() else {},
        _read(folder / "metrics.jsonl", lambda _: read_jsonl(folder / "metrics.jsonl")),
    )


def _read(file: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(file.read_text(encoding="utf-8") if file.exists() else "")
    except ValueError as error:
        problem = Problem(
            str(file), f"is torn: {error}", f"python -m lora_exp.report {file.parent.parent} lists it with the others"
        )
        raise UserError("there is nothing to report", [problem]) from error
