"""Stops a run that would lose more of its rows than the config allows, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping

from lora_exp.config import DataConfig
from lora_exp.data.tokenize import Limits, SplitReport
from lora_exp.errors import Problem, UserError, count
from lora_exp.preflight.lengths import Effect, effect, sufficient

KEYS = {"train": "recipe.max_length", "val": "recipe.eval_max_length"}


def require_rows_kept(config: DataConfig, limits: Mapping[str, Limits], reports: Mapping[str, SplitReport]) -> None:
    """Compare what was dropped and cut with `data.max_dropped_share` and `data.max_cut_share`.

    Args:
        config: The data section.
        limits: How rows were cut, by split.
        reports: What became of them, by split.

    Raises:
        UserError: Every split that loses more, with the reasons and the length that would keep enough.
    """
    problems = []
    for split, report in reports.items():
        found = effect(report.lengths, limits[split])
        for problem in (_dropped(config, split, report, found), _cut(config, split, report, found)):
            problems += [problem] if problem else []
    if problems:
        raise UserError("more of the data is lost than the config allows", problems)


def _dropped(config: DataConfig, split: str, report: SplitReport, found: Effect) -> Problem | None:
    allowed = config.max_dropped_share
    if allowed is None or found.dropped_share <= allowed:
        return None
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in report.dropped.items())
    what = f"{_of(found.dropped, found)} would be dropped: {reasons}; data.max_dropped_share={allowed:g}"
    better = sufficient(report.lengths, found.limits, lambda each: each.dropped_share <= allowed)
    mend = f"accept it with data.max_dropped_share={_rounded_up(found.dropped_share)}, or mend the rows"
    if better is not None:
        mend = f"{KEYS[split]}={better.limits.max_length} drops {better.dropped:,} of them; or {mend}"
    return Problem(report.source, what, mend)


def _cut(config: DataConfig, split: str, report: SplitReport, found: Effect) -> Problem | None:
    allowed = config.max_cut_share
    if allowed is None or found.cut_share <= allowed:
        return None
    tokens = count(found.cut_tokens, "token")
    what = f"{_of(found.cut, found)} would be cut, by {tokens} in all; data.max_cut_share={allowed:g}"
    better = sufficient(report.lengths, found.limits, lambda each: each.cut_share <= allowed)
    mend = f"accept it with data.max_cut_share={_rounded_up(found.cut_share)}"
    if better is not None:
        mend = f"{KEYS[split]}={better.limits.max_length} cuts {better.cut:,} of them; or {mend}"
    return Problem(report.source, what, mend)


def _of(part: int, found: Effect) -> str:
    return f"{part:,} of {count(found.rows, 'row')} ({part / found.rows:.1%})"


def _rounded_up(share: float) -> str:
    return f"{min(1.0, -(-share * 100 // 1) / 100):g}"
