"""Checkpoints in a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lora_exp.errors import Problem, UserError
from lora_exp.rules import flatten
from lora_exp.sweeps.identity import WITHOUT_EFFECT, lies_under

NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
"""What Trainer writes beside the adapter; without them a resume would not be the same run."""

SAME = ("recipe", "model", "quant", "lora", "data", "seed")
"""What must not change when a run goes on; how long it trains, and who watches, may."""


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint with the highest step that is whole, or None."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return next((path for path in reversed(found) if all((path / name).is_file() for name in NEEDED)), None)


def checkpoint_to_resume(resume: str | None, resolved: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint that `resume=<run folder>` goes on from; None without `resume`.

    Args:
        resume: The run folder.
        resolved: The config of the run that goes on.

    Raises:
        UserError: If the folder has no whole checkpoint, or its run was made of something else.
    """
    if resume is None:
        return None
    changed = _changed(Path(resume) / "config.yaml", resolved)
    if changed:
        raise UserError("the run cannot be resumed as something else", changed)
    checkpoint = newest_checkpoint(Path(resume) / "checkpoints")
    if checkpoint is None:
        problem = Problem("resume", f"{resume} has no checkpoint to go on from", "start it again with output_dir=...")
        raise UserError("the run cannot be resumed", [problem])
    return checkpoint


def _changed(saved: Path, resolved: Mapping[str, Any]) -> list[Problem]:
    """Name every key that says what is learned and differs from the saved config."""
    before: Any = OmegaConf.to_container(OmegaConf.load(saved)) if saved.is_file() else {}
    old, new = (flatten({name: config.get(name) for name in SAME}) for config in (before, resolved))
    mend = f"leave it as it was, or start a new run without resume={saved.parent}"
    return [
        Problem(key, f"was {old.get(key)!r} in {saved.parent} and is {new.get(key)!r} now", mend)
        for key in sorted(old.keys() | new.keys())
        if not lies_under(key, WITHOUT_EFFECT)
        and old.get(key) != new.get(key)
        and not isinstance(old.get(key, new.get(key)), dict)
    ]
