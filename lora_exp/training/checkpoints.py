"""Checkpoints in a run folder: which one a run goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lora_exp.errors import Problem, UserError
from lora_exp.rules import flatten
from lora_exp.run_folder import RunFolder
from lora_exp.sweeps.identity import WITHOUT_EFFECT, lies_under
from lora_exp.training.integrity import clear_leftovers, damage

STATE = "trainer_state.json"
"""Where Trainer keeps the step and the lines that were logged before it."""

DAMAGED = "damaged-"

SAME = ("recipe", "model", "quant", "lora", "data", "seed")
"""What must not change when a run goes on; how long it trains, and who watches, may."""


@dataclass(frozen=True)
class Found:
    """What a search for a checkpoint came to.

    Args:
        checkpoint: The newest that is as it was written; None: there is none.
        damaged: Newer ones that are not, each with what is wrong with it.
    """

    checkpoint: Path | None
    damaged: dict[Path, str]

    @property
    def lines(self) -> int:
        """How many lines the run had logged when the checkpoint was written."""
        if self.checkpoint is None:
            return 0
        return len(json.loads((self.checkpoint / STATE).read_text(encoding="utf-8"))["log_history"])

    def say(self) -> list[str]:
        """Return a line for each damaged one, and what is done about it."""
        instead = f"going on from {self.checkpoint}" if self.checkpoint else "starting again from the first step"
        return [f"{path} is damaged: {reason}; {instead}" for path, reason in self.damaged.items()]


def newest_checkpoint(checkpoints: Path) -> Found:
    """Return the checkpoint with the highest step that is whole. Every byte of those that are looked at is read."""
    damaged: dict[Path, str] = {}
    named = (path for path in checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal())
    for path in sorted(named, key=_step, reverse=True):
        reason = damage(path)
        if reason is None:
            return Found(path, damaged)
        damaged[path] = reason
    return Found(None, damaged)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def settle(folder: RunFolder, found: Found) -> None:
    """Make a run folder ready to be gone on with: leftovers of a kill go, damaged checkpoints are named so.

    A damaged one in its old place would count as the newest when old ones are deleted.
    """
    clear_leftovers(folder.path)
    for path in found.damaged:
        if path.parent.resolve() == folder.checkpoints.resolve():
            _set_aside(path)


def _set_aside(path: Path) -> None:
    names = (f"{DAMAGED}{path.name}", *(f"{DAMAGED}{path.name}.{number}" for number in range(2, 1000)))
    path.rename(next(place for name in names if not (place := path.with_name(name)).exists()))


def checkpoint_to_resume(resume: str | None, resolved: Mapping[str, Any], same_folder: bool) -> Found:
    """Return the checkpoint that `resume=<run folder>` goes on from; none without `resume`.

    A run that was stopped before its first one starts again in its folder.

    Args:
        resume: The run folder.
        resolved: The config of the run that goes on.
        same_folder: Whether it goes on where it was.

    Raises:
        UserError: If the run was made of something else, or there is nothing to go on from.
    """
    if resume is None:
        return Found(None, {})
    changed = _changed(Path(resume) / "config.yaml", resolved)
    if changed:
        raise UserError("the run cannot be resumed as something else", changed)
    if same_folder:
        clear_leftovers(Path(resume) / "checkpoints")
    found = newest_checkpoint(Path(resume) / "checkpoints")
    if found.checkpoint is None and (not same_folder or _is_finished(Path(resume))):
        what = "; ".join(f"{path.name} is damaged: {reason}" for path, reason in found.damaged.items())
        problem = Problem(
            "resume",
            f"{resume} has no checkpoint to go on from" + (f" ({what})" if what else ""),
            "start it again with output_dir=...",
        )
        raise UserError("the run cannot be resumed", [problem])
    return found


def _is_finished(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished")
    except (OSError, ValueError, KeyError):
        return False


def _changed(saved: Path, resolved: Mapping[str, Any]) -> list[Problem]:
    """Name every key that says what is learned and differs from the saved config."""
    if not saved.is_file():  # stopped before it was written
        return []
    before: Any = OmegaConf.to_container(OmegaConf.load(saved))
    old, new = (flatten({name: config.get(name) for name in SAME}) for config in (before, resolved))
    mend = f"leave it as it was, or start a new run without resume={saved.parent}"
    return [
        Problem(key, f"was {old.get(key)!r} in {saved.parent} and is {new.get(key)!r} now", mend)
        for key in sorted(old.keys() | new.keys())
        if not lies_under(key, WITHOUT_EFFECT)
        and old.get(key) != new.get(key)
        and not isinstance(old.get(key, new.get(key)), dict)
    ]
