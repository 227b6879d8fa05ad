"""The largest batch that a run will compute at once, from the lengths of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_exp.engine.packing import Family, Row, fill

Examples = npt.NDArray[Any]
"""Tokens of each example's prompt and of its answers [examples, 1 + answers]."""

STEPS = 200
"""Batches that are drawn, also for a run of fewer steps: it may meet any. Of more, the largest is hardly larger."""


@dataclass(frozen=True)
class Order:
    """How examples come together.

    Args:
        batch: Examples of a batch, on one device.
        batches: Batches whose gradients are summed before the optimiser moves.
        shuffled: Whether examples are drawn at random; if not, they come in order, as in an evaluation.
        whole: Whether a batch must be computed at once.
    """

    batch: int
    batches: int
    shuffled: bool
    whole: bool = False


def largest_flat(examples: Examples, order: Order, budget: int, common: int = 0) -> Examples:
    """Return the examples of the largest micro-batch of the packed engine.

    Args:
        examples: All of the split.
        order: How they come together.
        budget: Tokens of a micro-batch.
        common: Tokens from the start on that their prompts share, which a micro-batch holds once.
    """
    sizes = examples.sum(axis=1) - np.minimum(common, examples[:, 0])
    best = np.array([int(sizes.argmax())])
    for drawn in _drawn(len(examples), order, order.batch * order.batches):
        units = [drawn[first : first + order.batch] for first in range(0, len(drawn), order.batch)]
        units = units if order.whole else [np.array([one]) for one in drawn]
        for members in fill([int(sizes[unit].sum()) for unit in units], budget, common):
            chosen = np.concatenate([units[index] for index in members])
            if sizes[chosen].sum() > sizes[best].sum():
                best = chosen
    largest: Examples = examples[best]
    return largest


def largest_padded(examples: Examples, order: Order) -> tuple[int, int]:
    """Return rows and columns of the largest padded batch."""
    widths = examples[:, 0] + examples[:, 1:].max(axis=1)
    answers = examples.shape[1] - 1
    batches = _drawn(len(examples), order, order.batch)
    found = [(answers * len(drawn), int(widths[drawn].max())) for drawn in batches]
    return max(found, key=lambda shape: shape[0] * shape[1])


def _drawn(number: int, order: Order, size: int) -> list[npt.NDArray[Any]]:
    """Return which examples make each batch: some epochs of batches, or all in order."""
    if not order.shuffled:
        return [np.arange(first, min(first + size, number)) for first in range(0, number, size)]
    random = np.random.default_rng(0)
    groups: list[npt.NDArray[Any]] = []
    while len(groups) < STEPS:
        mixed = random.permutation(number)[: STEPS * size]
        groups += [mixed[first : first + size] for first in range(0, len(mixed), size)]
    return groups


def flat_row(examples: Examples, common: int) -> list[Family]:
    """Return families of these lengths, with token ids that stand for any.

    Args:
        examples: Their lengths.
        common: Tokens from the start on that their prompts share.
    """
    members: list[Family] = []
    for number, (prompt, *answers) in enumerate(examples.tolist()):
        start = np.where(np.arange(prompt) < common, 0, number)
        rows: list[Row] = []
        for answer in answers:
            # Nothing but `common` is shared across families: they part at their first token.
            index = len(members) * len(answers) + len(rows)
            ids = np.concatenate([start, np.full(answer, len(examples) + index)])
            labels = np.where(np.arange(prompt + answer) < prompt, -100, ids)
            rows.append(Row(index, ids, labels))
        members.append(Family(tuple(rows)))
    return members


@dataclass(frozen=True)
class Largest:
    """A batch: of the packed engine the lengths of its examples, of the padded one its rows and columns.

    Args:
        flat: Lengths of the examples.
        padded: Rows and columns.
        common: Tokens from the start on that the prompts share.
    """

    flat: Examples | None = None
    padded: tuple[int, int] = (0, 0)
    common: int = 0

    @property
    def key(self) -> Any:
        """What two batches have in common that are computed alike."""
        return self.padded if self.flat is None else (self.flat.shape, self.flat.tobytes(), self.common)

    @property
    def tokens(self) -> int:
        """Tokens that are computed at once."""
        if self.flat is None:
            return self.padded[0] * self.padded[1]
        shared = np.minimum(self.common, self.flat[:, 0])
        return int(self.flat.sum() - shared.sum() + shared.max())
