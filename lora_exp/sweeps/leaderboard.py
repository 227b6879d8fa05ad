"""Which point is best, and how sure that is: `leaderboard.csv` and `leaderboard.json`.

Nothing that a clock says is in them, so that a sweep that was killed and started again ends in the same files.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lora_exp.run_folder import to_json, write_whole
from lora_exp.sweeps.objective import Direction, direction_of
from lora_exp.sweeps.trials import Trial

STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Quantiles 0.975 of Student's t distribution for 1 to 30 degrees of freedom."""
NORMAL = 1.96


@dataclass(frozen=True)
class Interval:
    """A mean and the 95 % interval around it; one value alone has no interval."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return the interval of values that are repetitions of each other (Student's t)."""
        if len(values) < 2:
            return cls(values[0], None)
        freedom = len(values) - 1
        quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL
        return cls(fmean(values), quantile * stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Standing:
    """A point of the sweep with the trials that repeat it.

    Args:
        point: What is varied, by key.
        trials: One for each seed.
        objective: Over the trials that finished; None where none has.
    """

    point: dict[str, Any]
    trials: list[Trial]
    objective: Interval | None

    @property
    def status(self) -> str:
        """`finished` once one trial is; otherwise what became of them."""
        found = [trial.status for trial in self.trials]
        return next(status for status in ("finished", "running", "pruned", "failed") if status in found)

    @property
    def name(self) -> str:
        """The point in a line."""
        return ", ".join(f"{key}={value}" for key, value in self.point.items()) or "all"


@dataclass(frozen=True)
class Leaderboard:
    """The points of a sweep, best first; those without a number come last.

    Args:
        objective: What is compared.
        direction: Which way is better.
        standings: The points.
    """

    objective: str
    direction: Direction
    standings: list[Standing]

    @classmethod
    def of(cls, trials: Sequence[Trial], direction: Direction | None = None) -> Leaderboard:
        """Rank trials.

        Args:
            trials: As `read_trials` returns them.
            direction: Which way is better; None: as the objective's name says, else down.
        """
        objective = next((trial.objective_name for trial in trials if trial.objective_name), "objective")
        chosen = direction or direction_of(objective) or "minimize"
        groups: dict[str, list[Trial]] = {}
        for trial in trials:
            groups.setdefault(to_json(trial.point, indent=None), []).append(trial)
        standings = [_standing(members) for members in groups.values()]
        sign = 1 if chosen == "minimize" else -1
        standings.sort(key=lambda each: (each.objective is None, sign * each.objective.mean if each.objective else 0.0))
        return cls(objective, chosen, standings)

    @property
    def axes(self) -> list[str]:
        """The keys that vary."""
        return list(dict.fromkeys(key for each in self.standings for key in each.point))

    @property
    def tie(self) -> str | None:
        """Say that the best two are not told apart, or None where they are.

        By the difference between the two on each seed that both have finished (paired, Student's t): seeds share the
        order of the rows and the start of the adapter.
        """
        if len(self.standings) < 2 or self.standings[1].objective is None:
            return None
        best, next_best = ({t.seed: t.objective for t in each.trials} for each in self.standings[:2])
        both = [(best[seed], next_best[seed]) for seed in best if seed in next_best]
        pairs = [a - b for a, b in both if a is not None and b is not None]
        if len(pairs) < 2:
            return "one seed each: chance may have ordered the best two (sweep.seeds=5 tells more)"
        difference = Interval.of(pairs)
        assert difference.half is not None
        if abs(difference.mean) > difference.half:
            return None
        return (
            f"the best two are not told apart: over {len(pairs)} seeds they differ by "
            f"{difference.mean:+.3g} ± {difference.half:.2g}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return a flat row for each point, best first."""
        return [
            {
                "rank": rank if each.objective else None,
                "status": each.status,
                **{axis: each.point.get(axis) for axis in self.axes},
                self.objective: each.objective.mean if each.objective else None,
                "interval_95": each.objective.half if each.objective else None,
                "seeds": sum(trial.objective is not None for trial in each.trials),
                "folders": [trial.folder.name for trial in each.trials],
                "errors": [trial.error for trial in each.trials if trial.error],
            }
            for rank, each in enumerate(self.standings, start=1)
        ]


def _standing(members: list[Trial]) -> Standing:
    values = [trial.objective for trial in members if trial.objective is not None]
    return Standing(members[0].point, members, Interval.of(values) if values else None)


def write_leaderboard(folder: Path, board: Leaderboard) -> None:
    """Write both files into the sweep's folder, each whole or not at all."""
    rows = board.rows()
    summary = {"objective": board.objective, "direction": board.direction, "tie": board.tie, "points": rows}
    write_whole(folder / "leaderboard.json", to_json(summary) + "\n")
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    table.writeheader()
    table.writerows({key: " ".join(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows)
    write_whole(folder / "leaderboard.csv", text.getvalue())
