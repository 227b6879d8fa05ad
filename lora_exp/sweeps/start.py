"""The start of a multirun: every trial checked, the folder taken, the question written down."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from lora_exp.errors import Problem, UserError, count
from lora_exp.sweeps.identity import WITHOUT_EFFECT, lies_under
from lora_exp.sweeps.names import key_of
from lora_exp.sweeps.plan import SweepPlan, plan_sweep, quoted
from lora_exp.sweeps.question import Question, refuse, variant
from lora_exp.validation import without_effect

if TYPE_CHECKING:
    from lora_exp.compose import Composer

_held: list[FileLock] = []
"""Kept until the process ends: a sweep's folder belongs to one command at a time."""


@dataclass(frozen=True)
class Trials:
    """The trials of a multirun, checked; of a search, some in which each value occurs once.

    Args:
        plan: What the command means.
        jobs: The overrides of each.
        configs: Its config.
        extends: Whether a changed config joins the sweep of the same name.
    """

    plan: SweepPlan
    jobs: list[list[str]]
    configs: list[DictConfig]
    extends: bool


def check_trials(composer: Composer, overrides: list[str]) -> Trials:
    """Return the trials of a multirun, with nothing written yet.

    Raises:
        UserError: Everything that is wrong with any of them.
    """
    settings = composer.sweep_settings(overrides)
    if settings.dated:
        settings = replace(settings, folder=_free(settings.folder))
    plan = plan_sweep(overrides, settings)
    jobs = composer.jobs(plan.overrides, settings)
    configs = compose_all(composer, jobs)
    _require_effect(plan.axes, configs)
    lengths = same_evaluation_rows(configs, plan.overrides)
    plan = replace(plan, overrides=[*plan.overrides, *(f"{key}={_value(length)}" for key, length in lengths.items())])
    for config, (key, length) in product(configs, lengths.items()):
        OmegaConf.update(config, key, length)
    return Trials(plan, jobs, configs, settings.sweep.get("on_change") == "extend")


def start_sweep(trials: Trials) -> SweepPlan:
    """Return the plan of a multirun that may start now.

    Args:
        trials: Its trials, from `check_trials`.

    Raises:
        UserError: A folder in use; a question that is not the folder's.
    """
    _take(trials.plan)
    now = Question.of(trials.plan.axes, [_unresolved(config) for config in trials.configs])
    return _ask(trials.plan, now, trials.extends)


def compose_all(composer: Composer, jobs: list[list[str]]) -> list[DictConfig]:
    """Compose and check every job.

    Raises:
        UserError: What is wrong with any of them, each problem once.
    """
    configs, problems = [], dict[Problem, None]()
    for job in jobs:
        try:
            configs.append(composer.compose(job, check_values=True))
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(f"the config has {count(len(problems), 'problem')}", problems)
    return configs


def _require_effect(axes: tuple[str, ...], configs: list[DictConfig]) -> None:
    """Refuse to vary what changes nothing in any trial."""
    problems = [
        Problem(axis, "changes no result, so there is nothing to compare", "leave it out of the sweep")
        for axis in axes
        if lies_under(axis, WITHOUT_EFFECT)
    ]
    idle = [{problem.where: problem for problem in without_effect(config, axes)} for config in configs]
    problems += [problem for where, problem in idle[0].items() if all(where in each for each in idle)]
    if problems:
        raise UserError("the sweep cannot be made", problems)


def same_evaluation_rows(configs: list[DictConfig], overrides: list[str]) -> dict[str, int | None]:
    """Return what has all trials evaluated on the same tokens where their lengths differ: the largest, by key."""
    given = set(map(key_of, overrides))
    added = dict[str, int | None]()
    for name in ("max_length", "max_prompt_length"):
        key, lengths = f"recipe.eval_{name}", [config.recipe[name] for config in configs]
        if key not in given and len(set(lengths)) > 1:
            added[key] = None if None in lengths else max(lengths)
    return added


def _value(length: int | None) -> str:
    return "null" if length is None else str(length)


def _unresolved(config: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _free(folder: str) -> str:
    """Return a folder's name that no sweep has: two commands may start within a second."""
    names = (folder, *(f"{folder}-{number}" for number in range(2, 1000)))
    return next(name for name in names if not Path(name).exists())


def _take(plan: SweepPlan) -> None:
    """Lock the sweep's folder; the system frees it when the process ends, however it ends."""
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(plan.folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        problem = Problem(str(plan.folder), "another command is running this sweep", "wait for it, or use another name")
        raise UserError("the sweep cannot start", [problem]) from None
    except OSError as error:
        problem = Problem(str(plan.folder), f"cannot be written: {error.strerror}", "choose another sweep.name=...")
        raise UserError("the sweep cannot start", [problem]) from error
    _held.append(lock)


def _ask(plan: SweepPlan, now: Question, extend: bool) -> SweepPlan:
    """Write the question down, together with what the folder was asked before."""
    before = Question.read(plan.folder)
    added = []
    if before is not None:
        changes = before.changes(now)
        if changes and not extend:
            raise refuse(plan.folder, changes)
        if changes:
            added = [f"sweep.variant={quoted(variant(changes))}"]
        now = before.extended_by(now)
        added.append(f"sweep.axes=[{','.join(now.axes)}]")
    # In the order of first asking: a sweep that is often started again keeps one line for it.
    commands = list(map(list, dict.fromkeys(map(tuple, [*now.commands, sys.argv[1:]]))))
    now = replace(now, commands=commands, trials=plan.size)
    now.write(plan.folder)
    return replace(plan, overrides=[*plan.overrides, *added], axes=tuple(now.axes))
