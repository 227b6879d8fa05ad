"""Rows of a padded batch laid out as one flat row: no padding, and what rows have in common only once.

No torch here: a plan is numbers, made on the processor from token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_exp.data.kinds import IGNORED

Ids = npt.NDArray[np.int64]

DEEPEST = 64
"""Times that rows part one after the other; what comes after that is laid out row by row. Each is a call in a call."""


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
    """The rows of an example: a preference pair, or a single row."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        """Return the tokens that it takes when it is laid out by itself: what its rows share counts once."""
        shared = _alike(self.rows, 0)
        return shared + sum(len(row) - shared for row in self.rows)


@dataclass(frozen=True)
class Segment:
    """A stretch of the flat row, whose tokens all the same rows share.

    What follows it in some of those rows lies behind it, a branch after the other.

    Args:
        start: Its first place in the flat row.
        stop: The place behind its last token.
        end: The place behind the last of its branches.
        position: Of its first token in its rows.
        branches: What follows it.
    """

    start: int
    stop: int
    end: int
    position: int
    branches: tuple[Segment, ...] = ()

    def walk(self) -> Iterator[Segment]:
        """Yield it and all that follows it, in their order in the flat row."""
        yield self
        for branch in self.branches:
            yield from branch.walk()


def _alike(rows: Sequence[Row], first: int) -> int:
    """Return where rows that are alike up to `first` begin to differ, or the first of them ends."""
    one, *others = rows
    shared = len(one)
    for row in others:
        shared = min(shared, len(row))
        differs = np.flatnonzero(one.ids[first:shared] != row.ids[first:shared])
        shared = first + int(differs[0]) if len(differs) else shared
    return shared


def families(rows: Sequence[Row], rows_per_example: int) -> list[Family]:
    """Group the rows of each example.

    Args:
        rows: As TRL's collators order them: all first answers, then all second answers.
        rows_per_example: 1, or 2 for preference pairs.
    """
    examples = len(rows) // rows_per_example
    return [Family(tuple(rows[example::examples])) for example in range(examples)]


def fill(sizes: Sequence[int], budget: int, shared: int = 0) -> list[list[int]]:
    """Share things out over as few bins of `budget` as will do, and evenly, the largest first.

    Args:
        sizes: What each thing takes, beyond `shared`.
        budget: What a bin holds.
        shared: What all things have in common, which is in each bin once.

    Returns:
        Indices into `sizes`, a list a bin. A thing over the budget has a bin to itself.
    """
    if shared >= budget:
        return [[index] for index in range(len(sizes))]
    budget -= shared
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


def microbatches(units: Sequence[Sequence[Family]], budget: int, across: bool = True) -> list[list[int]]:
    """Share units of families out over as few micro-batches as will do, and evenly.

    Args:
        units: Families that stay together.
        budget: Tokens of a micro-batch, in which what all rows have in common from their start counts once.
        across: Whether rows of different families share it.

    Returns:
        Indices into `units`, a list a micro-batch. A unit over the budget has one to itself.
    """
    shared = _alike([row for unit in units for family in unit for row in family.rows], 0) if across else 0
    return fill([sum(len(family) - shared for family in unit) for unit in units], budget, shared)


@dataclass(frozen=True)
class PackedRow:
    """Rows in one flat row of T tokens, and which of its positions are scored.

    A position is scored once for each token that may follow it: S (position, token) pairs, which fill D places of
    the padded batch's per-token fields. D is larger than S where rows share scored tokens.

    Args:
        segments: The flat row's, those that nothing comes before.
        places: Where each row's tokens lie in the flat row, by the row's number.
        ids: Token ids [T].
        positions: Position ids [T]: each token's place in its own rows.
        scored: Positions in the flat row [S] whose next token is scored.
        targets: That token's id [S].
        rows: The padded batch's row [D] of each place.
        columns: Its column [D], counted as TRL does: column c is the score of token c + 1.
        sources: Which of the S fills it [D].
    """

    segments: tuple[Segment, ...]
    places: Mapping[int, Ids]
    ids: Ids
    positions: Ids
    scored: Ids
    targets: Ids
    rows: Ids
    columns: Ids
    sources: Ids


def pack(members: Sequence[Family], across: bool = True) -> PackedRow:
    """Lay families out in one flat row, in which what rows have in common from their start is there once.

    Args:
        members: The families.
        across: Whether rows of different families share too. A shared token has one hidden state, so where some of it
            is dropped at random, the same is dropped for all.
    """
    groups = [[row for family in members for row in family.rows]] if across else [family.rows for family in members]
    laid = _Laid()
    segments = tuple(segment for group in groups for segment in laid.follow(group, 0))
    places = {index: _joined(parts) for index, parts in laid.places.items()}
    at, targets, rows, columns = [], [], [], []
    for family in members:
        for row in family.rows:
            scored = np.flatnonzero(row.labels[1:] != IGNORED)
            at.append(places[row.index][scored])
            targets.append(row.labels[scored + 1])
            rows.append(np.full(len(scored), row.index))
            columns.append(scored)
    pairs = np.stack([_joined(at), _joined(targets)])
    unique, sources = np.unique(pairs, axis=1, return_inverse=True)
    return PackedRow(
        segments,
        places,
        _joined(laid.ids),
        _joined(laid.positions),
        unique[0],
        unique[1],
        _joined(rows),
        _joined(columns),
        sources.reshape(-1),
    )


class _Laid:
    """What of a flat row is laid out so far: token ids and positions, and where each row's tokens lie, in stretches."""

    def __init__(self) -> None:
        self.ids: list[Ids] = []
        self.positions: list[Ids] = []
        self.places: dict[int, list[Ids]] = {}
        self.total = 0

    def follow(self, rows: Sequence[Row], first: int, depth: int = 0) -> Iterator[Segment]:
        """Lay out what follows in rows that are alike up to `first`, a segment for each token that comes next.

        Args:
            rows: The rows.
            first: Where they begin to differ.
            depth: How often they have parted before.
        """
        following: dict[int, list[Row]] = {}
        for row in rows:
            if len(row) > first:
                following.setdefault(int(row.ids[first]) if depth < DEEPEST else row.index, []).append(row)
        for alike in following.values():
            last = _alike(alike, first)
            start = self._add(alike, first, last)
            stop = self.total
            branches = tuple(self.follow(alike, last, depth + 1))
            yield Segment(start, stop, self.total, first, branches)

    def _add(self, rows: Sequence[Row], first: int, last: int) -> int:
        start = self.total
        self.total += last - first
        self.ids.append(rows[0].ids[first:last])
        self.positions.append(np.arange(first, last))
        for row in rows:
            self.places.setdefault(row.index, []).append(np.arange(start, self.total))
        return start


def _joined(parts: list[Ids]) -> Ids:
    return np.concatenate(parts).astype(np.int64)
