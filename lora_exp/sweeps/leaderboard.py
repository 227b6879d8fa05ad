"""Which settings are best, and how sure that is: the mean over the seeds with a 95 % interval, best first."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

from lora_exp.errors import count
from lora_exp.run_folder import Status, to_json, write_whole
from lora_exp.sweeps.trials import Direction, Trial

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval by Student's t; without one (None) for a single value.

    Args:
        mean: Of the values.
        low: The interval's lower end.
        high: Its upper end.
    """

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """How far the interval reaches from the mean to each side."""
        return None if self.high is None else self.high - self.mean


@dataclass(frozen=True)
class Point:
    """One combination of settings, and the trials that tried it: one, or one a seed.

    Args:
        rank: 1 for the best; None where no trial has a result.
        axes: The settings.
        trials: All that tried them.
        objective: Over the finished trials; None where there is none.
    """

    rank: int | None
    axes: Mapping[str, Any]
    trials: Sequence[Trial]
    objective: Interval | None

    @property
    def results(self) -> list[Trial]:
        """The trials that count: finished, with an objective."""
        return [trial for trial in self.trials if counts(trial)]

    @property
    def best(self) -> Trial:
        """The trial with the best objective, or the first where there is no result."""
        sign = 1 if self.trials[0].direction == "minimize" else -1
        return min(self.results or self.trials, key=lambda trial: sign * (trial.objective or 0.0))

    @property
    def status(self) -> str:
        """The one trial's status, with its progress while it runs, or how many are what: `3 finished, 1 failed`."""
        if len(self.trials) > 1:
            return states(self.trials)
        (trial,) = self.trials
        progress = trial.progress if trial.status == "running" else None
        return trial.status if progress is None else f"{trial.status}, {progress:.0%}"

    def metric(self, name: str) -> Interval | None:
        """Return the mean of a final metric over the trials that count."""
        values = [trial.metrics.get(name) for trial in self.results]
        return interval([value for value in values if isinstance(value, int | float) and math.isfinite(value)])

    def mean(self, values: Sequence[float | None]) -> float | None:
        """Return the mean of those values that are there."""
        there = [value for value in values if value]
        return fmean(there) if there else None

    @property
    def seconds(self) -> float | None:
        """Mean time of the trials that count."""
        return self.mean([trial.seconds for trial in self.results])

    @property
    def peak_memory_bytes(self) -> float | None:
        """Mean peak memory of the trials that count."""
        return self.mean([trial.peak_memory_bytes for trial in self.results])


@dataclass(frozen=True)
class Leaderboard:
    """The points of a sweep, best first; those without a result last.

    Args:
        objective_name: What they are compared by.
        direction: Whether less or more of it is better.
        axes: The settings that differ.
        points: Every combination that was tried.
        tie: Whether the best two are told apart, as a sentence; empty where there are no two.
        told_apart: False where they are not, or where nobody can know.
    """

    objective_name: str
    direction: Direction
    axes: Sequence[str]
    points: Sequence[Point]
    tie: str
    told_apart: bool

    @property
    def trials(self) -> list[Trial]:
        """Every trial, in the order of the points."""
        return [trial for point in self.points for trial in point.trials]

    @property
    def best(self) -> Point | None:
        """The first point, if it has a result."""
        return self.points[0] if self.points and self.points[0].rank else None


def counts(trial: Trial) -> bool:
    """Whether a trial's objective is a result: a run that was pruned or goes on has none yet."""
    return trial.status == "finished" and trial.objective is not None


def leaderboard(trials: Sequence[Trial]) -> Leaderboard:
    """Group the trials by their settings and rank the groups by the mean of the objective."""
    name, way = (trials[0].objective_name, trials[0].direction) if trials else ("", "minimize")
    sign = 1 if way == "minimize" else -1
    grouped: dict[Any, list[Trial]] = {}
    for trial in trials:
        # A run without a config is like no other: its settings are not known.
        settings = tuple(map(repr, trial.axes.values())) if trial.config else trial.folder
        grouped.setdefault(settings, []).append(trial)
    points = [
        Point(None, group[0].axes, group, interval([trial.objective for trial in group if counts(trial)]))  # type: ignore[misc]
        for group in grouped.values()
    ]
    ranked = sorted((p for p in points if p.objective), key=lambda p: sign * p.objective.mean)  # type: ignore[union-attr]
    ranked = [Point(rank, p.axes, p.trials, p.objective) for rank, p in enumerate(ranked, 1)]
    axes = list(dict.fromkeys(key for trial in trials for key in trial.axes))
    tie, told_apart = compare(*ranked[:2]) if len(ranked) > 1 else ("", True)
    return Leaderboard(name, way, axes, [*ranked, *(p for p in points if not p.objective)], tie, told_apart)


# Statistics ------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> Interval | None:
    """Return the mean of some values and its interval; None of none."""
    if len(values) < 2:
        return Interval(values[0]) if values else None
    mean, reach = fmean(values), t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - reach, mean + reach)


@lru_cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return the t beyond which, to both sides, Student's distribution leaves 1 - confidence."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        low, high = high, high * 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < confidence else (low, middle)
    return high


def t_within(t: float, freedom: int) -> float:
    """Return the probability that Student's t lies between -t and t.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 if odd else 1, freedom - 1, 2):
        term *= cosine**2 * k / (k + 1)
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def compare(first: Point, second: Point) -> tuple[str, bool]:
    """Say whether two points are told apart, and by which test.

    Where both were tried with the same seeds, the difference seed by seed counts (paired t test): a seed that is
    good for one is often good for the other. Otherwise it is Welch's t test. Objectives come in steps, as an accuracy
    over few rows does; where they leave nothing that varies, only their number counts: a sign or a permutation test.
    """
    ours, theirs = ({t.seed: t.objective or 0.0 for t in point.results} for point in (first, second))
    shared = [seed for seed in ours if seed in theirs and seed is not None]
    if len(shared) >= 2:
        difference = interval([ours[seed] - theirs[seed] for seed in shared])
        assert difference is not None
        apart = not (difference.low or 0.0) <= 0 <= (difference.high or 0.0)
        test = f"paired t test over {len(shared)} seeds"
        if _is_zero(difference.half, difference.mean):
            difference = Interval(difference.mean)
            apart = not _is_zero(difference.mean) and 2 ** (1 - len(shared)) < 1 - CONFIDENCE
            test = f"the same with each of {len(shared)} seeds; sign test"
    else:
        values = [[t.objective or 0.0 for t in point.results] for point in (first, second)]
        if min(map(len, values)) < 2:
            return (
                "The best two cannot be told apart from so few seeds: one run each does not show how much the seed "
                "alone changes. In a grid, sweep.seeds=5 repeats every point.",
                False,
            )
        apart, test = _welch(*values)
        difference = Interval(fmean(values[0]) - fmean(values[1]))
    words = "are told apart" if apart else "are not told apart"
    reach = f" ± {difference.half:.2g}" if difference.half is not None else ""
    return f"The best two {words} at 95 %: they differ by {difference.mean:.3g}{reach} ({test}).", apart


def _is_zero(value: float | None, beside: float = 1.0) -> bool:
    """Whether a difference is one of rounding only."""
    return value is None or abs(value) <= 1e-9 * max(1.0, abs(beside))


def _welch(first: Sequence[float], second: Sequence[float]) -> tuple[bool, str]:
    """Return whether two means differ, and the test; degrees of freedom rounded down, to the cautious side."""
    parts = [variance(values) / len(values) for values in (first, second)]
    error = math.sqrt(sum(parts))
    difference = abs(fmean(first) - fmean(second))
    if _is_zero(error, difference):
        chance = 2 / math.comb(len(first) + len(second), len(first))
        return not _is_zero(difference) and chance < 1 - CONFIDENCE, "the same with every seed; permutation test"
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True)
    )
    return difference > t_quantile(max(1, math.floor(freedom))) * error, "Welch's t test"


# Files -----------------------------------------------------------------------------------------------


def write_leaderboard(folder: Path, trials: Sequence[Trial]) -> Leaderboard:
    """Write `leaderboard.csv` and `leaderboard.json` of the trials, a row a point, in one order."""
    board = leaderboard(trials)
    write_whole(folder / "leaderboard.csv", to_csv(board))
    write_whole(folder / "leaderboard.json", to_json(as_json(board)) + "\n")
    return board


def to_csv(board: Leaderboard) -> str:
    """Return the rows as CSV; a sweep that was killed and started again ends in the same file."""
    file = io.StringIO()
    rows = as_rows(board)
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_rows(board: Leaderboard) -> list[dict[str, Any]]:
    """Return a row a point: the settings, the objective with its interval, then every final metric's mean.

    Nothing that a clock says is in it.
    """
    metrics = [
        name for name in dict.fromkeys(name for trial in board.trials for name in trial.metrics) if not _timed(name)
    ]
    return [_row(point, board, metrics) for point in board.points]


def _row(point: Point, board: Leaderboard, metrics: Sequence[str]) -> dict[str, Any]:
    value = point.objective
    return {
        "rank": point.rank,
        **{key: point.axes.get(key) for key in board.axes},
        f"objective:{board.objective_name}": value.mean if value else None,
        "low": value.low if value else None,
        "high": value.high if value else None,
        "runs": len(point.trials),
        "finished": len(point.results),
        "status": point.status,
        "best_run": point.best.name,
        **{name: found.mean if (found := point.metric(name)) else None for name in metrics},
    }


def as_json(board: Leaderboard) -> dict[str, Any]:
    """Return the leaderboard with every trial of every point."""
    return {
        "objective": board.objective_name,
        "direction": board.direction,
        "axes": list(board.axes),
        "confidence": CONFIDENCE,
        "told_apart": board.told_apart,
        "tie": board.tie,
        "points": [
            {
                "rank": point.rank,
                "axes": dict(point.axes),
                "objective": vars(point.objective) if point.objective else None,
                "status": point.status,
                "trials": [_trial_json(trial) for trial in point.trials],
            }
            for point in board.points
        ],
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "name": trial.name,
        "status": trial.status,
        "seed": trial.seed,
        "objective": trial.objective,
        "error": trial.error,
        "metrics": {name: value for name, value in trial.metrics.items() if not _timed(name)},
    }


def _timed(metric: str) -> bool:
    return metric.endswith(("_runtime", "_per_second"))


def states(trials: Sequence[Trial]) -> str:
    """Return how many trials are in which state."""
    found = [trial.status for trial in trials]
    order: Sequence[Status] = ("finished", "running", "pruned", "failed")
    return ", ".join(f"{found.count(state):,} {state}" for state in order if state in found)


def summary(board: Leaderboard, whole: str = "") -> str:
    """Return how many trials there are, out of how many (` of 12`), and in which state."""
    if whole:
        return f"{len(board.trials):,}{whole} trials: {states(board.trials)}"
    return f"{count(len(board.trials), 'trial')}: {states(board.trials)}"
