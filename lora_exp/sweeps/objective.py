"""Which way is better."""

from __future__ import annotations

from typing import Literal

Direction = Literal["minimize", "maximize"]

LOWER = ("loss", "entropy", "runtime")
HIGHER = ("accuracies", "accuracy", "margins", "rewards/chosen", "logps/chosen", "per_second")


def direction_of(objective: str) -> Direction | None:
    """Return the direction in which a metric gets better, known from its name; None where the name does not tell."""
    if objective.endswith(LOWER):
        return "minimize"
    return "maximize" if objective.endswith(HIGHER) else None
