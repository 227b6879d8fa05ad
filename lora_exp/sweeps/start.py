"""The start of a multirun: every trial checked, the folder taken, the question written down."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from lora_exp.errors import Problem, UserError, count
from lora_exp.sweeps.plan import SweepPlan, plan_sweep, quoted
from lora_exp.sweeps.question import Question, refuse, variant

if TYPE_CHECKING:
    from lora_exp.compose import Composer

_held: list[FileLock] = []
"""Kept until the process ends: a sweep's folder belongs to one command at a time."""


def start_sweep(composer: Composer, overrides: list[str]) -> SweepPlan:
    """Return the plan of a multirun that may start now.

    Raises:
        UserError: Everything that is wrong with any trial; a folder in use; a question that is not the folder's.
    """
    settings = composer.sweep_settings(overrides)
    plan = plan_sweep(overrides, settings)
    configs = compose_all(composer, composer.jobs(plan.overrides, settings.params))
    _take(plan)
    now = Question.of(plan.axes, [_unresolved(config) for config in configs])
    return _ask(plan, now, settings.sweep.get("on_change") == "extend")


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


def _unresolved(config: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


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
    now = replace(now, commands=[*now.commands, sys.argv[1:]], trials=plan.size)
    now.write(plan.folder)
    return replace(plan, overrides=[*plan.overrides, *added], axes=tuple(now.axes))
