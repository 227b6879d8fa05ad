"""Rows of a padded batch laid out as one flat row: no padding, and what rows have in common only once.

No torch here: a plan is numbers, made on the processor from token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lora_exp.data.kinds import IGNORED

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One row without its padding.

    Args:
        index: Its number in the padded batch.
        ids: Its token ids.
        labels: As long as `ids`; `IGNORED` where the token is not scored. The first token never is.
    """

    index: int
    ids: Ids
    labels: Ids

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Family:
    """Rows that start alike: a preference pair, or a single row.

    Laid out as `prefix, rest of row 0, rest of row 1, ...`; a token sees the prefix and its own row before it.
    """

    rows: tuple[Row, ...]

    @cached_property
    def prefix(self) -> int:
        """Tokens that all rows share, from the start. Their hidden states are the same in every row."""
        first = self.rows[0].ids
        shared = len(first)
        for row in self.rows[1:]:
            shared = min(shared, len(row))
            differs = np.flatnonzero(first[:shared] != row.ids[:shared])
            shared = int(differs[0]) if len(differs) else shared
        return shared

    @cached_property
    def branches(self) -> tuple[int, ...]:
        """Tokens of each row after the prefix."""
        return tuple(len(row) - self.prefix for row in self.rows)

    def __len__(self) -> int:
        return self.prefix + sum(self.branches)


def families(rows: Sequence[Row], rows_per_example: int) -> list[Family]:
    """Group the rows of each example.

    Args:
        rows: As TRL's collators order them: all first answers, then all second answers.
        rows_per_example: 1, or 2 for preference pairs.
    """
    examples = len(rows) // rows_per_example
    return [Family(tuple(rows[example::examples])) for example in range(examples)]


def fill(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Share things out over as few bins of `budget` as will do, and evenly, the largest first.

    Returns:
        Indices into `sizes`, a list a bin. A thing over the budget has a bin to itself.
    """
    largest_first = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    number = max(1, -(-sum(sizes) // budget))
    while True:
        bins: list[list[int]] = [[] for _ in range(min(number, len(sizes)))]
        loads = [0] * len(bins)
        for index in largest_first:
            least = loads.index(min(loads))
            bins[least].append(index)
            loads[least] += sizes[index]
        if number >= len(sizes) or all(
            load <= budget or len(members) == 1 for load, members in zip(loads, bins, strict=True)
        ):
            return [sorted(members) for members in bins]
        number += 1


@dataclass(frozen=True)
class PackedRow:
    """Families end to end in one flat row of T tokens, and which of its positions are scored.

    A position is scored once for each token that may follow it: S (position, token) pairs, which fill D places of
    the padded batch's per-token fields. D is larger than S where rows share scored tokens.

    Args:
        families: In their order in the row.
        ids: Token ids [T].
        positions: Position ids [T]: each row counts on from the prefix.
        scored: Positions in the flat row [S] whose next token is scored.
        targets: That token's id [S].
        rows: The padded batch's row [D] of each place.
        columns: Its column [D], counted as TRL does: column c is the score of token c + 1.
        sources: Which of the S fills it [D].
    """

    families: tuple[Family, ...]
    ids: Ids
    positions: Ids
    scored: Ids
    targets: Ids
    rows: Ids
    columns: Ids
    sources: Ids


def pack(members: Sequence[Family]) -> PackedRow:
    """Lay families out in one flat row."""
    ids, positions, at, targets, rows, columns = [], [], [], [], [], []
    start = 0
    for family in members:
        ids.append(family.rows[0].ids[: family.prefix])
        positions.append(np.arange(family.prefix))
        branch_start = start + family.prefix
        for row in family.rows:
            length = len(row)
            ids.append(row.ids[family.prefix :])
            positions.append(np.arange(family.prefix, length))
            scored = np.flatnonzero(row.labels[1:] != IGNORED)
            shared = scored < family.prefix
            at.append(np.where(shared, start + scored, branch_start + scored - family.prefix))
            targets.append(row.labels[scored + 1])
            rows.append(np.full(len(scored), row.index))
            columns.append(scored)
            branch_start += length - family.prefix
        start += len(family)
    pairs = np.stack([_joined(at), _joined(targets)])
    unique, sources = np.unique(pairs, axis=1, return_inverse=True)
    return PackedRow(
        tuple(members),
        _joined(ids),
        _joined(positions),
        unique[0],
        unique[1],
        _joined(rows),
        _joined(columns),
        sources.reshape(-1),
    )


def _joined(parts: list[Ids]) -> Ids:
    return np.concatenate(parts).astype(np.int64)
