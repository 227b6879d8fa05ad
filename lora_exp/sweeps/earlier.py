"""What a trial's folder already holds, when the same sweep is started again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.errors import Problem, UserError


@dataclass(frozen=True)
class EarlierTrial:
    """A trial that an earlier start of the sweep left.

    Args:
        status: `finished`, `pruned`, `failed`, or `running` where it was killed.
        objectives: What it found, where it finished; the first one ranks it.
    """

    status: str
    objectives: list[float] | None


def earlier_trial(folder: Path, identity: str | None = None) -> EarlierTrial | None:
    """Return what a trial's folder holds; None where no trial was started in it.

    Args:
        folder: The trial's.
        identity: What it has to be a trial of, where that matters.

    Raises:
        UserError: If it holds a trial of another config.
    """
    run_json = folder / "run.json"
    if not run_json.is_file():
        return None
    facts = _facts(run_json)
    if identity is not None and facts.get("identity", identity) != identity:
        what = "holds a trial of another config"
        raise UserError(
            "the trial cannot start",
            [Problem(str(folder), what, "use another sweep.name=..., or move the folder away")],
        )
    found = facts.get("objectives") or {}
    whole = all(value is not None for value in found.values())  # null in JSON: it was no number
    objectives = list(found.values()) if found and whole else None
    return EarlierTrial(str(facts.get("status", "running")), objectives)


def _facts(run_json: Path) -> dict[str, Any]:
    """Read `run.json`; nothing where a kill came between claiming the folder and the first fact."""
    text = run_json.read_text(encoding="utf-8")
    facts: dict[str, Any] = json.loads(text) if text.strip() else {}
    return facts
