"""The trials of a sweep, read from their folders: whatever state a run was left in, it is listed."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from lora_exp.errors import Problem, UserError
from lora_exp.run_folder import Status, read_jsonl
from lora_exp.sweeps.identity import WITHOUT_EFFECT, lies_under
from lora_exp.sweeps.question import Question

Direction = Literal["minimize", "maximize"]

NOT_AN_AXIS = frozenset({"hydra", "objective", "output_dir", "resume", "seed", "store", "sweep", "tracker"})
"""Top-level keys that say where a run lands, who watches and how it is repeated, not what is tried."""

NO_RUN_JSON = "no run.json: it was stopped before it began, or has not begun yet"


def directions_of(objective: str | Sequence[str], given: Direction | Sequence[Direction] | None) -> list[Direction]:
    """Return whether less or more is better of each objective: as given, or as its name tells."""
    names = [objective] if isinstance(objective, str) else objective
    ways = [given] if isinstance(given, str) else given
    return [direction(name) for name in names] if ways is None else [cast("Direction", str(way)) for way in ways]


def direction(objective: str) -> Direction:
    """Return whether less or more of a metric is better, as far as its name tells."""
    name = objective.lower()
    lower_is_better = ("loss", "kl", "perplexity", "runtime", "entropy", "rejected")
    return "minimize" if any(word in name for word in lower_is_better) else "maximize"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Args:
        folder: The run folder.
        name: The folder's path below what was read, e.g. `3`.
        status: Of `run.json`.
        axes: The settings that differ between the trials, by their config key.
        seed: Repetitions of one point differ in it.
        objective: The final value of `objective_name`; None where there is none, or none that is a number.
        objective_name: The metric that the trials are compared by.
        direction: Whether less or more of it is better.
        metrics: `metrics.json`; empty for a run that did not finish.
        error: Why it failed.
        wall_times: Seconds by stage.
        peak_memory_bytes: None where the run did not get so far.
        run: All of `run.json`.
        config: The resolved config, its keys joined by dots.
    """

    folder: Path
    name: str
    status: Status
    axes: Mapping[str, Any]
    seed: int | None
    objective: float | None
    objective_name: str
    direction: Direction
    metrics: Mapping[str, Any]
    error: str | None
    wall_times: Mapping[str, float]
    peak_memory_bytes: int | None
    run: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """Time of all stages."""
        return sum(self.wall_times.values())

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; read when first asked for, as a table needs none of them."""
        return _jsonl(self.folder / "metrics.jsonl")

    @property
    def progress(self) -> float | None:
        """The share of the training that is logged; None before the first step, or where the config does not tell."""
        last = self.steps[-1] if self.steps else {}
        for done, whole in (("step", "trainer.max_steps"), ("epoch", "trainer.num_train_epochs")):
            total = self.config.get(whole)
            if isinstance(total, int | float) and total > 0 and done in last:
                return min(float(last[done]) / total, 1.0)
        return None

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The lines of `samples.jsonl`."""
        return _jsonl(self.folder / "samples.jsonl")

    @cached_property
    def command(self) -> str:
        """The command that runs this trial alone again, in a folder of its own; empty where Hydra left no trace."""
        overrides = _parse_yaml(_text(self.folder / ".hydra" / "overrides.yaml"))
        if not isinstance(overrides, list):
            return ""
        hydra = _parse_yaml(_text(self.folder / ".hydra" / "hydra.yaml")) or {}
        sources = hydra.get("hydra", {}).get("runtime", {}).get("config_sources", [])
        config_dir = next((source["path"] for source in sources if source["provider"] == "command-line"), None)
        flags = ["--config-dir", config_dir] if config_dir else []
        # What made it part of a sweep is left out: alone it lands in a folder of its own.
        alone = [str(each) for each in overrides if not str(each).startswith("sweep.")]
        return shlex.join(["python", "-m", "lora_exp", *flags, *alone])


def read_trials(folders: Path | Sequence[Path], objective: str | None = None) -> list[Trial]:
    """Read every run in or below the folders.

    Args:
        folders: A sweep folder, or any mix of sweep folders and run folders.
        objective: The metric to compare by; None: the one that most of the runs name.

    Raises:
        UserError: If a folder is not there, or holds no run.
    """
    given = [folders] if isinstance(folders, Path) else list(folders)
    found: dict[Path, None] = {}
    problems = []
    for folder in given:
        runs = list(find_runs(folder))
        if not runs:
            what = "holds no run" if folder.is_dir() else "is no folder"
            problems.append(Problem(str(folder), what, "name a run or a sweep folder"))
        found |= dict.fromkeys(runs)
    if problems:
        raise UserError("there is nothing to report", problems)
    root = given[0] if len(given) == 1 and given[0] not in found else _parent(found)
    trials = [_read_trial(folder, folder.relative_to(root).as_posix()) for folder in found]
    trials.sort(key=lambda trial: _natural(trial.name))
    axes = derive_axes(trials, Question.read(root))
    name = objective or _common_objective(trials)
    way = _common_direction(trials, name)
    return [
        replace(trial, axes=of_trial, objective_name=name, direction=way, objective=_value(trial, name))
        for trial, of_trial in zip(trials, axes, strict=True)
    ]


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the run folders in or below a folder; what a run keeps inside is not looked through."""
    for path, names, files in os.walk(folder):
        if "run.json" in files or ".hydra" in names:
            names.clear()
            yield Path(path)
        names.sort()


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what puts folder 9 before folder 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _parent(folders: Iterable[Path]) -> Path:
    return Path(os.path.commonpath([folder.parent for folder in folders]))


def _read_trial(folder: Path, name: str) -> Trial:
    run = _json(folder / "run.json")
    config = read_config(folder / "config.yaml")
    if run and not run.get("choices"):
        run["choices"] = _composed_choices(folder)
    status = run.get("status")
    seed = config.get("seed")
    return Trial(
        folder=folder,
        name=name,
        status=cast("Status", status) if status in ("running", "finished", "failed", "pruned") else "failed",
        axes={},
        seed=seed if isinstance(seed, int) else None,
        objective=None,
        objective_name=_objective_name(run, config),
        direction="minimize",
        metrics=_json(folder / "metrics.json"),
        error=run.get("error") or (None if run else NO_RUN_JSON),
        wall_times=run.get("wall_times") or {},
        peak_memory_bytes=run.get("peak_memory_bytes"),
        run=run,
        config=config,
    )


def _objective_name(run: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return what a run is ranked by, the first of several; one that ended early has it in its config alone."""
    named = run.get("objective_name") or config.get("objective") or config.get("recipe.objective") or ""
    return str(named[0] if isinstance(named, list) else named)


def _common_objective(trials: Sequence[Trial]) -> str:
    names = Counter(trial.objective_name for trial in trials if trial.objective_name)
    return names.most_common(1)[0][0] if names else ""


def _common_direction(trials: Sequence[Trial], objective: str) -> Direction:
    """Return the direction that a run was given for an objective, or the one that the name tells."""
    given = (trial.run.get("direction") for trial in trials if trial.objective_name == objective)
    return next((way for way in given if way in ("minimize", "maximize")), direction(objective))


def _value(trial: Trial, objective: str) -> float | None:
    value = trial.run.get("objective") if trial.objective_name == objective else None
    value = trial.metrics.get(objective) if value is None else value
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


# Axes ------------------------------------------------------------------------------------------------


def derive_axes(trials: Sequence[Trial], question: Question | None = None) -> list[dict[str, Any]]:
    """Return each trial's values of the settings that differ.

    Where the choice of a group differs (`lora=lora,dora`), it stands for the keys that follow from it. A sweep's own
    axes come first, also before a second trial differs in them, and stand for what the config computes from them.
    """
    known = [trial for trial in trials if trial.config]
    keys = dict.fromkeys(key for trial in known for key in trial.config if key.partition(".")[0] not in NOT_AN_AXIS)
    keys = {key: None for key in keys if not lies_under(key, WITHOUT_EFFECT)}
    differing = [key for key in keys if len({_hashable(trial.config.get(key)) for trial in known}) > 1]
    groups = dict.fromkeys(key.partition(".")[0] for key in differing)
    chosen = [group for group in groups if len({_choice(trial, group) for trial in known} - {None}) > 1]
    axes = chosen + [key for key in differing if not _follows(key, known, chosen)]
    if question is not None:
        asked = [axis for axis in question.axes if axis not in NOT_AN_AXIS]
        chosen = list(dict.fromkeys([*chosen, *(axis for axis in asked if "." not in axis)]))
        told = (*asked, *question.varied)
        axes = [
            *asked,
            *(
                key
                for key in axes
                if not lies_under(key, told) and not _is_computed(key, question, asked, known, chosen)
            ),
        ]
    return [{key: _setting(trial, key, chosen) for key in axes} if trial.config else {} for trial in trials]


def _is_computed(
    key: str, question: Question, asked: Sequence[str], trials: Sequence[Trial], chosen: Sequence[str]
) -> bool:
    """Whether the config computes a key, and the sweep's axes tell its value: half of `max_length`, say."""
    if "${" not in str(question.common.get(key)):
        return False
    values: dict[tuple[Any, ...], set[Any]] = {}
    for trial in trials:
        point = tuple(_hashable(_setting(trial, axis, chosen)) for axis in asked)
        values.setdefault(point, set()).add(_hashable(trial.config.get(key)))
    return all(len(found) == 1 for found in values.values())


def _setting(trial: Trial, key: str, chosen: Sequence[str]) -> Any:
    return _choice(trial, key) if key in chosen else trial.config.get(key)


def _choice(trial: Trial, group: str) -> str | None:
    choices: Mapping[str, str] = trial.run.get("choices") or {}
    return choices.get(group)


def _follows(key: str, trials: Iterable[Trial], chosen: Sequence[str]) -> bool:
    """Whether a key has one value for each choice of its group, so that the choice says it all."""
    group = key.partition(".")[0]
    values: dict[str | None, set[Any]] = {}
    for trial in trials:
        values.setdefault(_choice(trial, group), set()).add(_hashable(trial.config.get(key)))
    return group in chosen and all(len(found) == 1 for found in values.values())


def _hashable(value: Any) -> Any:
    # 1 and 1.0 are one value; 1 and true are two.
    return (isinstance(value, bool), json.dumps(value, default=str) if isinstance(value, list | dict) else value)


# Files -----------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """Return the leaves of a YAML mapping, their keys joined by dots; nothing where there is no such file."""
    config: dict[str, Any] = {}
    for section in re.split(r"^(?=[^\s#])", _text(path), flags=re.MULTILINE):
        config |= _leaves(section)
    return config


@lru_cache(maxsize=4096)
def _leaves(section: str) -> dict[str, Any]:
    # By top-level key and remembered: the configs of a sweep differ in few keys, and YAML takes milliseconds a file.
    parsed = _parse_yaml(section)
    return dict(_flatten(parsed)) if isinstance(parsed, dict) else {}


def _flatten(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def sweep_command(folder: Path) -> str:
    """Return the command that asked a sweep's question first, or as Hydra noted it; empty where neither is there."""
    question = Question.read(folder)
    if question is not None and question.commands:
        return shlex.join(["python", "-m", "lora_exp", *question.commands[0]])
    noted = re.search(r"^    task:\n((?:    - .*\n)+)", _text(folder / "multirun.yaml"), re.MULTILINE)
    overrides = _parse_yaml(noted[1]) if noted else None
    return shlex.join(["python", "-m", "lora_exp", "-m", *map(str, overrides)]) if overrides else ""


def _composed_choices(folder: Path) -> dict[str, Any]:
    """Return the choices that Hydra noted, for a run that ended before it noted them itself."""
    found = re.search(r"^    choices:\n((?:      .*\n)+)", _text(folder / ".hydra" / "hydra.yaml"), re.MULTILINE)
    choices = _parse_yaml(found[1]) if found else None
    return {key: value for key, value in choices.items() if "/" not in key} if isinstance(choices, dict) else {}


def _parse_yaml(text: str) -> Any:
    """Return what YAML says, or None where a file is torn."""
    import yaml

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - a safe one
    except yaml.YAMLError:
        return None


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or nothing where the file is missing or torn."""
    try:
        found = json.loads(_text(path) or "{}")
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path)
    except json.JSONDecodeError:
        return []


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
