"""What a trial's folder already holds, when the same sweep is started again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.errors import Problem, UserError
from lora_exp.training.checkpoints import newest_checkpoint


@dataclass(frozen=True)
class EarlierTrial:
    """A trial that an earlier start of the sweep left.

    Args:
        status: `finished`, `pruned`, `failed`, or `running` where it was killed.
        objective: What it found, where it finished.
        checkpoint: Where it can go on from; None: from the beginning.
    """

    status: str
    objective: float | None
    checkpoint: Path | None


def earlier_trial(folder: Path, identity: str) -> EarlierTrial | None:
    """Return what a trial's folder holds; None where no trial was started in it.

    Raises:
        UserError: If it holds a trial of another config.
    """
    run_json = folder / "run.json"
    if not run_json.is_file():
        return None
    facts = _facts(run_json)
    if facts.get("identity", identity) != identity:
        what = "holds a trial of another config"
        raise UserError(
            "the trial cannot start",
            [Problem(str(folder), what, "use another sweep.name=..., or move the folder away")],
        )
    checkpoint = newest_checkpoint(folder / "checkpoints")
    return EarlierTrial(str(facts.get("status", "running")), facts.get("objective"), checkpoint)


def _facts(run_json: Path) -> dict[str, Any]:
    """Read `run.json`; nothing where a kill came between claiming the folder and the first fact."""
    text = run_json.read_text(encoding="utf-8")
    facts: dict[str, Any] = json.loads(text) if text.strip() else {}
    return facts
