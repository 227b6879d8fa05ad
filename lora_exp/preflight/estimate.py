"""An estimate of memory, itemised, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TRAINING = "training"


@dataclass(frozen=True)
class Item:
    """A part of what a run holds in memory.

    Args:
        name: What it is.
        size: Bytes.
        how: Where the number comes from.
    """

    name: str
    size: int
    how: str = ""


@dataclass(frozen=True)
class Estimate:
    """What a run will hold in memory at most.

    Args:
        items: What is there together in training.
        stages: The most in the other stages, by name: bytes.
    """

    items: tuple[Item, ...]
    stages: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The most of all stages, in bytes."""
        return max(self.training, *self.stages.values(), 0)

    @property
    def training(self) -> int:
        """Bytes in training."""
        return sum(item.size for item in self.items)

    @property
    def stage(self) -> str:
        """The stage that needs most."""
        return max({TRAINING: self.training, **self.stages}.items(), key=lambda each: each[1])[0]
