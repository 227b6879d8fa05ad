"""How a flat row is cut into blocks of queries against just the keys that they see.

Blocks are computed as plain matrix products (`attention.py`), parts of like size in one call. Which token sees which is
told by two numbers a token, whatever rows share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_exp.engine import flex
from lora_exp.engine.packing import Segment

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
        ends: The place behind the last token that sees it, for each token [T].
        positions: Its place in its rows [T].
    """

    ends: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Sight:
        """Return what the tokens of these segments see, with all that follows them."""
        every = [each for segment in segments for each in segment.walk()]
        ends = [torch.full((each.stop - each.start,), each.end) for each in every]
        positions = [torch.arange(each.position, each.position + each.stop - each.start) for each in every]
        return cls(torch.cat(ends), torch.cat(positions))

    def to(self, device: torch.device) -> Sight:
        """Return it on a device."""
        return Sight(self.ends.to(device), self.positions.to(device))

    def seen(self, queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
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

    queries: torch.Tensor
    keys: torch.Tensor
    allowed: torch.Tensor


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
        queries, keys = (_rounded(max(len(getattr(part, name)) for part in parts)) for name in ("queries", "keys"))
        self.queries = torch.stack([_padded(part.queries, queries) for part in parts]).to(device)
        self.keys = torch.stack([_padded(part.keys, keys) for part in parts]).to(device)
        mask = torch.full((len(parts), 1, queries, keys), float("-inf"))
        is_real = torch.zeros(len(parts), queries, dtype=torch.bool)
        for number, part in enumerate(parts):
            height, width = part.allowed.shape
            mask[number, 0, :height, :width].masked_fill_(part.allowed, 0)
            mask[number, 0, height:, 0] = 0  # padding sees something, or its softmax would be no number
            is_real[number, :height] = True
        self.mask = mask.to(device)
        self.padding = (~is_real).flatten().nonzero()[:, 0].to(device)
        self.real = is_real.flatten().nonzero()[:, 0].to(device)
        self.tokens = self.queries.flatten()[self.real]


def _rounded(length: int) -> int:
    """Return a length that many blocks share: a processor compiles a product for each (`PackedForward`)."""
    return length + -length % 16 if length > 64 else length


def _padded(places: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([places, places[:1].expand(length - len(places))])


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
            parts = list(self._parts(self._segments, torch.empty(0, dtype=torch.int64), window))
            self._blocks[window] = [Block(group, self._device) for group in _grouped_parts(parts)]
        return self._blocks[window]

    def _parts(self, segments: Sequence[Segment], path: torch.Tensor, window: int | None) -> Iterator[Part]:
        """Yield the parts of segments and what follows them. `path`: the places of all that comes before them."""
        for segment in segments:
            if segment.end - segment.start <= DENSE:
                own = torch.arange(segment.start, segment.end)
                yield self._part(own, torch.cat([_in_sight(path, len(path), window), own]), window)
            else:
                yield from self._cut(segment, path, window)

    def _cut(self, segment: Segment, path: torch.Tensor, window: int | None) -> Iterator[Part]:
        """Cut a segment and the first of what follows it, and so on, into parts; then the other branches."""
        stretch = [segment]
        while stretch[-1].branches:
            stretch.append(stretch[-1].branches[0])
        first, row = len(path), torch.cat([path, torch.arange(segment.start, stretch[-1].stop)])
        for start in range(first, len(row), QUERIES):
            queries = row[start : start + QUERIES]
            yield self._part(queries, _in_sight(row[: start + QUERIES], start, window), window)
        for each in stretch:
            yield from self._parts(each.branches[1:], row[: first + each.stop - segment.start], window)

    def _part(self, queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> Part:
        return Part(queries, keys, self._sight.seen(queries[:, None], keys[None], window))


def _in_sight(row: torch.Tensor, first: int, window: int | None) -> torch.Tensor:
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
