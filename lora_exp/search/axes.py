"""An axis of a search: from an override to Optuna's distribution, and from a drawn value back to an override."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Sweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution


@dataclass(frozen=True)
class Axis:
    """A key that a search varies.

    Args:
        key: As an override names it, with a leading `+` where it has one.
        distribution: What Optuna draws from.
        written: Of a choice, how each value stands in an override.
    """

    key: str
    distribution: BaseDistribution
    written: Mapping[Any, str]

    @classmethod
    def of(cls, override: Override) -> Axis:
        """Return the axis that an override means.

        `interval(0.01,0.5)` is a range of numbers, `int(interval(1,8))` of whole ones, `range(64,513,64)` of steps
        that lie in order; `tag(log, ...)` draws on a logarithmic scale; any list is a choice without order.
        """
        key, value = override.get_key_element(), override.value()
        if isinstance(value, IntervalSweep):
            return cls(key, _interval(value), {})
        if isinstance(value, RangeSweep) and not value.shuffle:
            return cls(key, _range(value), {})
        written = {_plain(each): each for each in override.sweep_string_iterator()}
        return cls(key, CategoricalDistribution(list(written)), written)

    def override(self, value: Any) -> str:
        """Return a drawn value as an override."""
        return f"{self.key}={self.written.get(value, value)}"


def axes_of(overrides: Iterable[Override]) -> dict[str, Axis]:
    """Return the axes among some overrides, by key without its `+`; a later one replaces an earlier one."""
    return {each.key_or_group: Axis.of(each) for each in overrides if each.is_sweep_override()}


def _interval(sweep: IntervalSweep) -> BaseDistribution:
    low, high = sweep.start, sweep.end
    assert low is not None
    assert high is not None
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=_logarithmic(sweep))
    return FloatDistribution(float(low), float(high), log=_logarithmic(sweep))


def _range(sweep: RangeSweep) -> BaseDistribution:
    values = list(sweep.range())
    first, last = values[0], values[-1]
    if all(isinstance(each, int) for each in values):
        # Optuna has no logarithmic scale in steps.
        step = 1 if _logarithmic(sweep) else int(sweep.step)
        return IntDistribution(int(first), int(last), step=step, log=_logarithmic(sweep))
    return FloatDistribution(float(first), float(last), step=float(sweep.step))


def _logarithmic(sweep: Sweep) -> bool:
    return "log" in sweep.tags


def _plain(written: str) -> Any:
    """Return a value of a choice as Optuna keeps it: a number or a truth value, or else as it is written."""
    if written.lower() in ("true", "false"):
        return written.lower() == "true"
    for kind in (int, float):
        try:
            return kind(written)
        except ValueError:
            continue
    return None if written == "null" else written
