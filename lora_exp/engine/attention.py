"""Attention over a flat row in which each token sees its own row's past and nothing else.

Registered with transformers as the implementation `packed` (`AttentionInterface`, read in transformers 5.23): it
serves every architecture that asks that interface. Without a layout it is transformers' own sdpa, so generation and
padded batches work as before.

Computed as plain matrix products over blocks of queries against just the keys that they see; blocks of like size go
through one call. torch 2.13's
scaled_dot_product_attention on a processor runs bf16 at a tenth of the matrix product's rate for rows of some hundred
tokens; this runs at 2.5 to 3 times that. Scores and softmax are float32 in half precision, as in that kernel.
On CUDA half precision goes through one kernel instead (`flex.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_exp.engine import flex
from lora_exp.engine.packing import Family

PACKED = "packed"
"""The name under which transformers knows this attention."""

DENSE = 64
"""Families up to this many tokens are one part: fewer, larger products beat what causality saves."""

QUERIES = 64
"""Queries a part in longer families."""

CALLS = 30_000
"""What the calls of one block cost, in scores of all heads that could be computed meanwhile (measured on two cores)."""

SCORES = 2**19
"""Scores a head in one block at most, so that they stay near the processor's caches."""

REFUSED = ("softcap", "s_aux", "position_bias", "sinks")
"""Arguments with which some architectures change the scores; not computed here."""


@dataclass(frozen=True)
class Part:
    """Some tokens of a family and what they see.

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
    """Which tokens of a flat row see which.

    Args:
        families: In their order in the row.
        device: Where the masks are needed.
        padding: Tokens behind the families, which see none of them.
    """

    def __init__(self, families: Sequence[Family], device: torch.device, padding: int = 0) -> None:
        self.families = families
        self.padding = padding
        self.device = device
        self._blocks: dict[int | None, list[Block]] = {}
        self._flex: dict[int | None, Any] = {}

    def flex_mask(self, window: int | None) -> Any:
        """Return the row's `BlockMask`; its layers share it."""
        if window not in self._flex:
            self._flex[window] = flex.block_mask(flex.Places.of(self.families, self.device), window)
        return self._flex[window]

    def blocks(self, window: int | None) -> list[Block]:
        """Return the blocks of the row. `window`: a token sees this many tokens back, itself included."""
        if window not in self._blocks:
            parts = list(self._parts(window))
            self._blocks[window] = [Block(group, self.device) for group in _grouped_parts(parts)]
        return self._blocks[window]

    def _parts(self, window: int | None) -> Iterator[Part]:
        start = 0
        for family in self.families:
            if len(family) <= DENSE:
                yield _whole(family, start, window)
            else:
                yield from _cut(family, start, window)
            start += len(family)
        if self.padding:
            places = torch.arange(start, start + self.padding)
            yield Part(places, places, _causal(places, places, None))


def _whole(family: Family, start: int, window: int | None) -> Part:
    """Return a short family as one part."""
    shared, length = family.prefix, len(family)
    position, branch = torch.arange(length), torch.full((length,), -1)
    end = shared
    for number, size in enumerate(family.branches):
        position[end : end + size] = torch.arange(shared, shared + size)
        branch[end : end + size] = number
        end += size
    own = (branch[None] == branch[:, None]) | (branch[None] == -1)
    places = torch.arange(start, start + length)
    return Part(places, places, _causal(position, position, window) & own)


def _cut(family: Family, start: int, window: int | None) -> Iterator[Part]:
    """Cut a long family's rows into parts; the prefix is computed with its first row."""
    shared = family.prefix
    branch = start + shared
    for number, size in enumerate(family.branches):
        row = torch.cat([torch.arange(start, start + shared), torch.arange(branch, branch + size)])
        for first in range(0 if number == 0 else shared, len(row), QUERIES):
            last = min(first + QUERIES, len(row))
            oldest = 0 if window is None else max(0, first - window + 1)
            allowed = _causal(torch.arange(first, last), torch.arange(oldest, last), window)
            yield Part(row[first:last], row[oldest:last], allowed)
        branch += size


def _causal(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return which keys each query may see, by position in their row [queries, keys]."""
    distance = queries[:, None] - keys[None]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


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


class _BlockAttention(torch.autograd.Function):  # type: ignore[misc]
    """softmax(q k^T) v over the blocks of a layout; q [T, H, D], k and v [T, KV, D], H a multiple of KV."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: list[Block], scale: float
    ) -> torch.Tensor:
        out = q.new_empty(q.shape)
        saved = []
        with torch.autocast(q.device.type, enabled=False):
            for block in blocks:
                queries, keys, values = _grouped(q, block, k), _seen(k, block), _seen(v, block)
                weights = _weights(queries, keys, block.mask, scale)
                out.index_copy_(0, block.tokens, _ungrouped(weights @ values, block, q))
                saved += [queries, keys, values, weights]
        ctx.save_for_backward(*saved)
        ctx.blocks, ctx.scale, ctx.key_shape = blocks, scale, k.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(grad), grad.new_zeros(ctx.key_shape), grad.new_zeros(ctx.key_shape)
        for number, block in enumerate(ctx.blocks):
            queries, keys, values, weights = saved[4 * number : 4 * number + 4]
            upstream = _grouped(grad, block, dk, padding=0)
            scores = torch._softmax_backward_data(upstream @ values.mT, weights, -1, weights.dtype)
            dq.index_copy_(0, block.tokens, _ungrouped((scores @ keys).mul_(ctx.scale), block, dq))
            _add_seen(dk, block, (scores.mT @ queries).mul_(ctx.scale))
            _add_seen(dv, block, weights.mT @ upstream)
        return dq, dk, dv, None, None


def _grouped(q: torch.Tensor, block: Block, k: torch.Tensor, padding: float | None = None) -> torch.Tensor:
    """Return a block's queries [N * KV, H / KV * Q, D]: the heads that share a key head stand together."""
    number, length = block.queries.shape
    rows = q.index_select(0, block.queries.flatten())
    if padding is not None:
        rows.index_fill_(0, block.padding, padding)
    heads = k.shape[1]
    split = rows.view(number, length, heads, -1, q.shape[2])
    return split.permute(0, 2, 3, 1, 4).reshape(number * heads, -1, q.shape[2])


def _ungrouped(rows: torch.Tensor, block: Block, q: torch.Tensor) -> torch.Tensor:
    """Return the real ones of a block's rows [N * KV, H / KV * Q, D] as [tokens, H, D]."""
    number, length = block.queries.shape
    split = rows.view(number, q.shape[1], length, q.shape[2]).transpose(1, 2)
    return split.reshape(-1, *q.shape[1:]).index_select(0, block.real)


def _seen(k: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the keys (or values) that a block sees [N * KV, K, D]."""
    number, length = block.keys.shape
    rows = k.index_select(0, block.keys.flatten()).view(number, length, *k.shape[1:])
    return rows.transpose(1, 2).reshape(-1, length, k.shape[2])


def _add_seen(total: torch.Tensor, block: Block, part: torch.Tensor) -> None:
    """Add [N * KV, K, D] to the places of a block's keys; of padding it is 0."""
    number, length = block.keys.shape
    rows = part.view(number, -1, length, total.shape[2]).transpose(1, 2)
    total.index_add_(0, block.keys.flatten(), rows.reshape(-1, *total.shape[1:]))


def _weights(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    if math.frexp(scale)[0] == 0.5:  # a power of two: nothing is rounded
        scores = _product(queries * scale, keys)
    else:
        scores = _product(queries, keys)
        scores *= scale
    by_head = scores.view(len(mask), -1, *mask.shape[2:])
    by_head += mask
    return torch.softmax(scores, -1, out=scores).to(queries.dtype)


def _product(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return q k^T in float32 or wider.

    A float32 number that came from bfloat16 goes back without loss, so a processor may multiply in bfloat16 and sum in
    float32, at three times the rate.
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    if queries.device.type != "cpu" or queries.dtype != torch.bfloat16:
        return queries.to(wide) @ keys.to(wide).mT
    products: Any = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        return queries.to(wide) @ keys.to(wide).mT
    finally:
        products.fp32_precision = before


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each row of the layout; without one, as transformers' sdpa does.

    Args:
        module: The attention layer.
        query: [1, H, T, D].
        key: [1, KV, T, D].
        value: [1, KV, T, D].
        attention_mask: For sdpa only.
        dropout: Share of attention weights dropped; only 0 is computed here.
        scaling: Factor of the scores.
        layout: From `PackedForward`.
        sliding_window: Tokens that a token sees back, itself included; None: all.
        kwargs: Other arguments of the architecture.

    Returns:
        [1, T, H, D], and no weights.

    Raises:
        NotImplementedError: If the architecture changes the scores in a way that is not computed here.
    """
    if layout is None:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return attended
    refused = [name for name in REFUSED if kwargs.get(name) is not None]
    if dropout:
        refused.append("attention dropout")
    if refused:
        raise NotImplementedError(f"its attention uses {', '.join(refused)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if flex.suits(query):
        mask = layout.flex_mask(sliding_window)
        attended_by_kernel, _ = flex_attention_forward(module, query, key, value, mask, scaling=scale)
        return attended_by_kernel, None
    rows = (each[0].transpose(0, 1) for each in (query, key, value))
    return _BlockAttention.apply(*rows, layout.blocks(sliding_window), scale)[None], None


def use_packed_attention(base: Any) -> None:
    """Make a transformers model attend through this module."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    base.set_attn_implementation(PACKED)
