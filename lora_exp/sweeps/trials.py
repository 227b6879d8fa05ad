"""The trials of a sweep, read back from their run folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from lora_exp.errors import Problem, UserError
from lora_exp.sweeps.identity import with_effect

SEED = "seed"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Args:
        folder: Its run folder.
        status: `running`, `finished`, `failed` or `pruned`.
        point: What it varies, by key, without the seed.
        seed: Its seed; None where its config cannot be read.
        objective_name: What is compared.
        objective: The number, where it finished.
        metrics: Its final numbers.
        error: Why it failed.
    """

    folder: Path
    status: str
    point: dict[str, Any]
    seed: int | None
    objective_name: str | None
    objective: float | None
    metrics: dict[str, float]
    error: str | None


def trial_folders(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among and directly inside some folders, in order of their names.

    Raises:
        UserError: If a folder holds none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        inside = [path] if (path / "run.json").is_file() else [each.parent for each in path.glob("*/run.json")]
        if not inside:
            raise UserError("there is nothing to compare", [Problem(str(path), "holds no run and no sweep")])
        found |= dict.fromkeys(sorted(inside))
    return list(found)


def read_trials(folders: Sequence[Path]) -> list[Trial]:
    """Read trials; what a kill left half-written counts as not there."""
    configs = [_config(folder, _changed(folder)) for folder in folders]
    keys = list(dict.fromkeys(key for config in configs for key in config if key != SEED))
    known = [config for config in configs if config]
    axes = [key for key in keys if any(config.get(key) != known[0].get(key) for config in known)]
    axes = [key for key in axes if not _follows(key, axes, known)]
    return [_trial(folder, config, axes) for folder, config in zip(folders, configs, strict=True)]


def _changed(folder: Path) -> int:
    file = folder / "config.yaml"
    return file.stat().st_mtime_ns if file.is_file() else 0


@lru_cache(maxsize=10_000)
def _config(folder: Path, changed: int) -> dict[str, Any]:  # noqa: ARG001 - a changed file is read again
    """Return what can change a result; read once, since a sweep looks at all its trials after each of them.

    The option taken from a group says more than the keys that it sets (`quant=4bit`) and goes before them.
    """
    choices = _json(folder / "run.json").get("choices", {})
    options = {name: option for name, option in choices.items() if name not in ("tracker", "experiment")}
    return options | with_effect(_yaml(folder / "config.yaml"))


def _follows(key: str, axes: Sequence[str], configs: Sequence[dict[str, Any]]) -> bool:
    """Whether a key's value is told by one that comes before it, as half of max_length is: it is no axis of its own."""
    for before in axes[: axes.index(key)]:
        told: dict[str, Any] = {}
        if all(told.setdefault(repr(each.get(before)), each.get(key)) == each.get(key) for each in configs):
            return True
    return False


def _trial(folder: Path, config: dict[str, Any], axes: Sequence[str]) -> Trial:
    run, metrics = _json(folder / "run.json"), _json(folder / "metrics.json")
    return Trial(
        folder=folder,
        status=str(run.get("status", "running")),
        point={axis: config[axis] for axis in axes if axis in config},
        seed=config.get(SEED),
        objective_name=run.get("objective_name"),
        objective=run.get("objective") if run.get("status") == "finished" else None,
        metrics=metrics,
        error=run.get("error"),
    )


def _json(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    loaded: dict[str, Any] = json.loads(text) if text.strip() else {}
    return loaded


def _yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    return dict(yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader) or {})
