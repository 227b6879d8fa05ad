"""What a multirun command means, worked out before its first trial: what varies, which trials, in which folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.errors import OverrideParseException

from lora_exp.errors import Problem, UserError, count
from lora_exp.sweeps.names import key_of

MANY = 200
"""Trials that nobody is asked about; more than this may be a slip of a comma."""


@dataclass(frozen=True)
class SweepSettings:
    """What the plan needs of the config, before any trial of it is composed.

    Args:
        sweep: The group `sweep`.
        params: `hydra.sweeper.params`: axes that the config names.
        n_trials: Trials that a sweeper draws; None: it runs a grid. As the config has it.
        search: What draws them: `sampler`, `pruner`, `storage`; nothing of a grid.
        seed: The first seed.
        folder: `hydra.sweep.dir`.
        dated: Whether that is a date and a time that nobody chose.
    """

    sweep: Mapping[str, Any]
    params: Mapping[str, str]
    n_trials: Any
    search: Mapping[str, Any]
    seed: int
    folder: str
    dated: bool


@dataclass(frozen=True)
class SweepPlan:
    """A multirun, worked out.

    Args:
        folder: Where its trials' folders are made.
        axes: The keys that vary.
        overrides: The command's own, and what the plan adds to them.
        size: How many trials there will be.
    """

    folder: Path
    axes: tuple[str, ...]
    overrides: list[str]
    size: int


def plan_sweep(overrides: list[str], settings: SweepSettings) -> SweepPlan:
    """Work out what a multirun command means.

    Raises:
        UserError: If the axes make no sweep: a range without values, more trials than anyone means.
    """
    axes = {each.key_or_group: each for each in parsed_where_possible(_with_params(overrides, settings.params))}
    axes = {key: each for key, each in axes.items() if each.is_sweep_override()}
    problems = [problem for each in axes.values() if (problem := _wrong_axis(each))]
    added = []
    seeds = settings.sweep.get("seeds")
    if seeds and "seed" in axes:
        problems.append(Problem("sweep.seeds", "seed is swept already", "keep one of the two"))
    elif seeds and settings.n_trials is not None:
        problems.append(Problem("sweep.seeds", "repeats the points of a grid; a search draws its own", "leave it out"))
    elif seeds:
        added.append("seed=" + ",".join(str(settings.seed + number) for number in range(seeds)))
    if settings.n_trials is not None and not (isinstance(settings.n_trials, int) and settings.n_trials > 0):
        problems.append(Problem("hydra.sweeper.n_trials", f"should be 1 or more, not {settings.n_trials!r}"))
    if settings.n_trials is not None and not axes:
        mend = "recipe.learning_rate='tag(log,interval(1e-5,1e-3))'"
        problems.append(Problem("hydra.sweeper", "there is nothing to search: no key has a range or a choice", mend))
    if problems:
        raise UserError("the sweep cannot be made", problems)
    if settings.search:
        from lora_exp.search.study import check_search

        check_search(settings.search)
    names = [*axes, *(["seed"] if seeds else [])]
    added += [f"sweep.axes=[{','.join(names)}]", f"hydra.sweep.dir={quoted(settings.folder)}"]
    size = settings.n_trials or _points(axes.values()) * (seeds or 1)
    _require_consent(size, bool(settings.sweep.get("confirm")))
    without = [each for each in overrides if key_of(each) not in map(key_of, added)]
    return SweepPlan(Path(settings.folder), tuple(names), [*without, *added], size)


def _with_params(overrides: list[str], params: Mapping[str, str]) -> list[str]:
    """Return the overrides behind the config's own axes, as Hydra's sweepers read them: the later wins."""
    return [*(f"{key}={value}" for key, value in params.items()), *overrides]


def parsed_where_possible(overrides: list[str]) -> list[Override]:
    """Return the overrides that can be parsed; the rest is told with everything else that is wrong with the config."""
    parser, parsed = OverridesParser.create(), []
    for each in overrides:
        try:
            parsed += parser.parse_overrides([each])
        except OverrideParseException:
            continue
    return parsed


def _wrong_axis(axis: Override) -> Problem | None:
    """Say why an axis has no values, or one of them twice, if so."""
    value = axis.value()
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        if value.start > value.end:
            what = f"interval({value.start:g}, {value.end:g}) runs from high to low"
            return Problem(axis.key_or_group, what, f"{axis.key_or_group}=interval({value.end:g},{value.start:g})")
        if "log" in value.tags and value.start <= 0:
            what = f"a logarithmic scale has no {value.start:g}"
            return Problem(axis.key_or_group, what, "begin the interval above 0, or leave tag(log, ...) out")
        return None
    written = list(axis.sweep_string_iterator()) if axis.is_discrete_sweep() else None
    if written is not None and not written:
        what = f"{str(axis.input_line).partition('=')[2]} holds no value"
        return Problem(axis.key_or_group, what, f"{axis.key_or_group}=0.1,0.3")
    return _twice(axis.key_or_group, written or [])


def _twice(key: str, written: list[str]) -> Problem | None:
    """Say which value an axis names twice, in the same words or in others: 0.1 and 0.10."""
    first: dict[str, str] = {}
    for each in written:
        value = _plain(each)
        if value in first:
            both = each if first[value] == each else f"{first[value]} and {each}"
            return Problem(key, f"{both}: the same trial twice", "sweep.seeds=2 repeats every point with another seed")
        first[value] = each
    return None


def _plain(written: str) -> str:
    """Return a value as it is compared: a number whichever way it is written."""
    try:
        return repr(float(written))
    except ValueError:
        return written


def _points(axes: Iterable[Override]) -> int:
    points = 1
    for axis in axes:
        if axis.is_discrete_sweep():
            points *= len(list(axis.sweep_string_iterator()))
    return points


def _require_consent(size: int, given: bool) -> None:
    if size > MANY and not given:
        what = f"this command means {count(size, 'trial')}"
        raise UserError("the sweep does not start yet", [Problem("sweep", what, "if so: add sweep.confirm=true")])


def quoted(path: str) -> str:
    """Return a path as a value of Hydra's grammar."""
    return QuotedString(path, Quote.single).with_quotes()
