"""`sweep.json`: what a sweep asks, so that the same name never comes to mean two questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_exp.errors import Problem, UserError
from lora_exp.run_folder import to_json, write_whole
from lora_exp.sweeps.identity import lies_under, with_effect
from lora_exp.sweeps.names import safe

FILE = "sweep.json"
LONGEST_VARIANT = 50


@dataclass(frozen=True)
class Question:
    """What all trials of a sweep have in common, and what sets them apart.

    Args:
        axes: The keys that vary.
        varied: Every key whose value is not the same in all trials, those that follow from an axis included.
        common: The other keys' values, as the config has them: interpolations are not resolved.
        commands: The command lines that asked it.
        trials: How many trials the last of them means.
    """

    axes: list[str]
    varied: list[str]
    common: dict[str, Any]
    commands: list[list[str]] = field(default_factory=list)
    trials: int = 0

    @classmethod
    def of(cls, axes: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> Question:
        """Return the question that trials of these composed configs ask."""
        values = [with_effect(config) for config in configs]
        keys = {key: None for each in values for key in each}
        common = {
            key: values[0][key]
            for key in keys
            if all(key in each and each[key] == values[0][key] for each in values) and not lies_under(key, tuple(axes))
        }
        return cls(list(axes), [key for key in keys if key not in common], common)

    @classmethod
    def read(cls, folder: Path) -> Question | None:
        """Return the question of a sweep's folder; None where it holds none."""
        file = folder / FILE
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def write(self, folder: Path) -> None:
        """Keep it in the sweep's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, to_json(asdict(self)) + "\n")

    def changes(self, now: Question) -> dict[str, tuple[Any, Any]]:
        """Return what is another value now, by key: before and after. What either of the two varies is no change."""
        varied = (*self.varied, *now.varied, *self.axes, *now.axes)
        keys = [key for key in {**self.common, **now.common} if not lies_under(key, varied)]
        both = {key: (self.common.get(key), now.common.get(key)) for key in keys}
        return {key: (before, after) for key, (before, after) in both.items() if before != after}

    def extended_by(self, now: Question) -> Question:
        """Return the question that both ask together; its common values stay those of the first."""
        axes = [*self.axes, *(axis for axis in now.axes if axis not in self.axes)]
        varied = [*self.varied, *(key for key in now.varied if key not in self.varied)]
        common = {key: value for key, value in self.common.items() if key not in varied}
        return Question(axes, varied, common, self.commands, now.trials)


def refuse(folder: Path, changes: Mapping[str, tuple[Any, Any]]) -> UserError:
    """Return the error of a sweep whose config is not what it was."""
    mend = "give it back its value, use another sweep.name, or add sweep.on_change=extend"
    last = list(changes)[-1]
    problems = [
        Problem(key, f"was {before!r} in {folder} and is {after!r} now", mend if key == last else "")
        for key, (before, after) in changes.items()
    ]
    return UserError("the sweep cannot go on as something else", problems)


def variant(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Return what sets the trials of an extension apart, for their folders' names."""
    return safe(",".join(f"{key}={after}" for key, (_, after) in changes.items()), LONGEST_VARIANT)
