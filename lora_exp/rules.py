"""Rules between keys: a table of facts that must hold, checked all at once on the composed values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_exp.errors import Problem


@dataclass(frozen=True)
class Rule:
    """A relation between keys that no single key's type can express.

    Args:
        keys: Dotted keys whose values `broken` receives, in this order; the first is named as the place.
            A key that this config does not have arrives as None.
        broken: True where the rule does not hold.
        what: What is wrong, with `{0}`, `{1}`... standing for the values.
        mend: What to type instead.
    """

    keys: tuple[str, ...]
    broken: Callable[..., bool]
    what: str
    mend: str

    def check(self, values: Mapping[str, Any]) -> Problem | None:
        """Return the problem where the rule is broken by `values` (dotted key to value)."""
        given = [values.get(key) for key in self.keys]
        if not self.broken(*given):
            return None
        return Problem(self.keys[0], self.what.format(*given), self.mend)


def broken_rules(rules: Iterable[Rule], values: Mapping[str, Any], invalid: set[str]) -> list[Problem]:
    """Check every rule whose keys all have valid values, so that one wrong type does not hide the rest."""
    checkable = (rule for rule in rules if not invalid.intersection(rule.keys))
    return [problem for rule in checkable if (problem := rule.check(values))]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a": {"b": 1}}` as `{"a": {"b": 1}, "a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat[name] = value
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
    return flat
