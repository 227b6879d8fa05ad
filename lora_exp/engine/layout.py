"""How a flat row is cut into blocks of queries against just the keys that they see.

Blocks are computed as plain matrix products (`attention.py`), parts of like size in one call. Which token sees which is
told by two numbers a token, whatever rows share. Planned in numpy: a plan is thousands of small steps, each of which
torch, above all without data (`preflight/live.py`), takes many times as long for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_exp.engine import flex
from lora_exp.engine.packing import Ids, Segment

DENSE = 64
"""A segment with its branches is one part up to this many tokens: fewer, larger products beat what causality saves."""

QUERIES = 64
"""Queries a part of a longer one."""

CALLS = 30_000
"""What the calls of one block cost, in scores of all heads that could be computed meanwhile (measured on two cores)."""

SCORES = 2**19
"""Scores a head in one block at most, so that they stay near the processor's caches."""


@dataclass(frozen=True)
class Sight:
    """Which tokens of a flat row see which: each sees itself and what comes before it in its own rows.

    Behind a segment lie first its branches, which all see it, and then what does not.

    Args:
        ends: The place behind the last token that sees it, for each token [T]; of numpy, or of torch on a device.
        positions: Its place in its rows [T].
    """

    ends: Any
    positions: Any

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Sight:
        """Return what the tokens of these segments see, with all that follows them."""
        every = [each for segment in segments for each in segment.walk()]
        ends = np.repeat([each.end for each in every], [each.stop - each.start for each in every])
        positions = [np.arange(each.position, each.position + each.stop - each.start) for each in every]
        return cls(ends, np.concatenate(positions))

    def to(self, device: torch.device) -> Sight:
        """Return it as tensors on a device."""
        return Sight(torch.from_numpy(self.ends).to(device), torch.from_numpy(self.positions).to(device))

    def seen(self, queries: Any, keys: Any, window: int | None) -> Any:
        """Return whether the tokens at the places `queries` see those at `keys`; both are broadcast.

        Args:
            queries: Places in the flat row.
            keys: Places in the flat row.
            window: A token sees this many tokens back, itself included; None: all.
        """
        seen = (keys <= queries) & (queries < self.ends[keys])
        return seen if window is None else seen & (self.positions[queries] - self.positions[keys] < window)


@dataclass(frozen=True)
class Part:
    """Some tokens and what they see.

    Args:
        queries: Their places in the flat row.
        keys: The places of what they may see.
        allowed: Which of these each may see [queries, keys].
    """

    queries: Ids
    keys: Ids
    allowed: npt.NDArray[np.bool_]


class Block:
    """N parts of like size that are computed together, padded to Q queries and K keys.

    Attributes:
        queries: Places of the queries [N, Q].
        keys: Places of the keys [N, K].
        mask: Added to the scores [N, 1, Q, K]: 0 or -inf.
        padding: Which of the N * Q queries are padding; places in the flattened `queries`.
        real: The others.
        tokens: The places of the real ones in the flat row.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        queries, keys = _stacked([part.queries for part in parts]), _stacked([part.keys for part in parts])
        mask = np.full((len(parts), 1, queries.shape[1], keys.shape[1]), -np.inf, dtype=np.float32)
        is_real = np.zeros(queries.shape, dtype=bool)
        for number, part in enumerate(parts):
            height, width = part.allowed.shape
            np.copyto(mask[number, 0, :height, :width], 0, where=part.allowed)
            mask[number, 0, height:, 0] = 0  # padding sees something, or its softmax would be no number
            is_real[number, :height] = True

        def there(array: npt.NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        self.queries, self.keys, self.mask = there(queries), there(keys), there(mask)
        self.padding, self.real = there(np.flatnonzero(~is_real)), there(np.flatnonzero(is_real))
        self.tokens = there(queries[is_real])


def _rounded(length: int) -> int:
    """Return a length that many blocks share: a processor compiles a product for each (`PackedForward`)."""
    return length + -length % 16 if length > 64 else length


def _stacked(parts: Sequence[Ids]) -> Ids:
    """Return places of several parts as rows of one length; the first of each stands where it is shorter."""
    rows = np.empty((len(parts), _rounded(max(map(len, parts)))), dtype=np.int64)
    for row, places in zip(rows, parts, strict=True):
        row[: len(places)] = places
        row[len(places) :] = places[0]
    return rows


class Layout:
    """Which tokens of a flat row are computed together, and what they see.

    Args:
        segments: The flat row's, from `pack`.
        device: Where the masks are needed.
        padding: Tokens behind them, which see one another alone.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device, padding: int = 0) -> None:
        total = segments[-1].end
        behind = [Segment(total, total + padding, total + padding, 0)] if padding else []
        self._segments = (*segments, *behind)
        self._sight = Sight.of(self._segments)
        self._device = device
        self._blocks: dict[int | None, list[Block]] = {}
        self._flex: dict[int | None, Any] = {}

    def flex_mask(self, window: int | None) -> Any:
        """Return the row's `BlockMask`; its layers share it."""
        if window not in self._flex:
            self._flex[window] = flex.block_mask(self._sight.to(self._device), window)
        return self._flex[window]

    def blocks(self, window: int | None) -> list[Block]:
        """Return the blocks of the row. `window`: a token sees this many tokens back, itself included."""
        if window not in self._blocks:
            parts = list(self._parts(self._segments, np.empty(0, dtype=np.int64), window))
            self._blocks[window] = [Block(group, self._device) for group in _grouped_parts(parts)]
        return self._blocks[window]

    def _parts(self, segments: Sequence[Segment], path: Ids, window: int | None) -> Iterator[Part]:
        """Yield the parts of segments and what follows them. `path`: the places of all that comes before them."""
        for segment in segments:
            if segment.end - segment.start <= DENSE:
                own = np.arange(segment.start, segment.end)
                yield self._part(own, np.concatenate([_in_sight(path, len(path), window), own]), window)
            else:
                yield from self._cut(segment, path, window)

    def _cut(self, segment: Segment, path: Ids, window: int | None) -> Iterator[Part]:
        """Cut a segment and the first of what follows it, and so on, into parts; then the other branches."""
        stretch = [segment]
        while stretch[-1].branches:
            stretch.append(stretch[-1].branches[0])
        first, row = len(path), np.concatenate([path, np.arange(segment.start, stretch[-1].stop)])
        for start in range(first, len(row), QUERIES):
            queries = row[start : start + QUERIES]
            yield self._part(queries, _in_sight(row[: start + QUERIES], start, window), window)
        for each in stretch:
            yield from self._parts(each.branches[1:], row[: first + each.stop - segment.start], window)

    def _part(self, queries: Ids, keys: Ids, window: int | None) -> Part:
        return Part(queries, keys, self._sight.seen(queries[:, None], keys[None], window))


def _in_sight(row: Ids, first: int, window: int | None) -> Ids:
    """Return what of a row's places the token at position `first`, or one after it, may see."""
    return row if window is None else row[max(0, first - window + 1) :]


def _grouped_parts(parts: Sequence[Part]) -> list[Sequence[Part]]:
    """Share parts out over blocks, the largest first, so that calls and padding together cost least.

    Parts that follow one another by size make a block; where to cut is found by dynamic programming.
    """
    parts = sorted(parts, key=lambda part: (len(part.keys), len(part.queries)), reverse=True)
    least, cut = [0.0], [0]
    for end in range(1, len(parts) + 1):
        options = ((least[start] + cost, start) for start, cost in _blocks_before(parts, end))
        cost, start = min(options)
        least.append(cost)
        cut.append(start)
    groups: list[Sequence[Part]] = []
    end = len(parts)
    while end:
        groups.append(parts[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def _blocks_before(parts: Sequence[Part], end: int) -> Iterator[tuple[int, int]]:
    """Return where a block that ends before part `end` may start, and what it costs; a block of one part always may."""
    queries = 0
    for start in reversed(range(end)):
        queries = max(queries, _rounded(len(parts[start].queries)))
        scores = (end - start) * queries * _rounded(len(parts[start].keys))
        if start < end - 1 and scores > SCORES:
            return
        yield start, CALLS + scores
