"""Attention over a flat row in which each token sees its own row's past and nothing else.

Registered with transformers as the implementation `packed` (`AttentionInterface`, read in transformers 5.23): it
serves every architecture that asks that interface. Without a layout it is transformers' own sdpa, so generation and
padded batches work as before.

Computed as plain matrix products over blocks of queries against just the keys that they see. torch 2.13's
scaled_dot_product_attention on a processor runs bf16 at a tenth of the matrix product's rate for rows of some hundred
tokens; this runs at 2.5 to 3 times that. Scores and softmax are float32 in half precision, as in that kernel.
On CUDA half precision goes through one kernel instead (`flex.py`).
"""

from __future__ import annotations

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

DENSE = 256
"""Families up to this many tokens are one block: fewer, larger products beat the part that causality saves."""

QUERIES = 128
"""Queries a block in longer families."""

REFUSED = ("softcap", "s_aux", "position_bias", "sinks")
"""Arguments with which some architectures change the scores; not computed here."""


@dataclass(frozen=True)
class Block:
    """Queries that are computed together.

    Args:
        queries: Their place in the flat row.
        keys: The places of what they may see; one or two runs.
        mask: Added to the scores [queries, keys]: 0 or -inf.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: torch.Tensor


class Layout:
    """Which tokens of a flat row see which.

    Args:
        families: In their order in the row.
        device: Where the masks are needed.
    """

    def __init__(self, families: Sequence[Family], device: torch.device) -> None:
        self.families = families
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
            self._blocks[window] = list(self._build(window))
        return self._blocks[window]

    def _build(self, window: int | None) -> Iterator[Block]:
        start = 0
        for family in self.families:
            if len(family) <= DENSE:
                yield self._dense(family, start, window)
            else:
                yield from self._split(family, start, window)
            start += len(family)

    def _dense(self, family: Family, start: int, window: int | None) -> Block:
        """Return the one block of a short family."""
        shared, length = family.prefix, len(family)
        position, branch = torch.arange(length), torch.full((length,), -1)
        end = shared
        for number, size in enumerate(family.branches):
            position[end : end + size] = torch.arange(shared, shared + size)
            branch[end : end + size] = number
            end += size
        own = (branch[None] == branch[:, None]) | (branch[None] == -1)
        mask = self._mask(_causal(position, position, window) & own)
        place = slice(start, start + length)
        return Block(place, (place,), mask)

    def _split(self, family: Family, start: int, window: int | None) -> Iterator[Block]:
        """Cut a long family's rows into blocks; the prefix is computed with its first row."""
        shared = family.prefix
        offset = start
        for number, size in enumerate(family.branches):
            begin = 0 if number == 0 else shared
            for first in range(begin, shared + size, QUERIES):
                last = min(first + QUERIES, shared + size)
                oldest = 0 if window is None else max(0, first - window + 1)
                mask = self._mask(_causal(torch.arange(first, last), torch.arange(oldest, last), window))
                queries = slice(offset + first, offset + last)
                if number == 0 or oldest >= shared:
                    keys: tuple[slice, ...] = (slice(offset + oldest, offset + last),)
                else:
                    keys = (slice(start + oldest, start + shared), slice(offset + shared, offset + last))
                yield Block(queries, keys, mask)
            # Token p of the next row stands where its own branch begins plus p - shared.
            offset += size

    def _mask(self, allowed: torch.Tensor) -> torch.Tensor:
        return torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf")).to(self.device)


def _causal(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return which keys each query may see, by position in their row [queries, keys]."""
    distance = queries[:, None] - keys[None]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


class _BlockAttention(torch.autograd.Function):  # type: ignore[misc]
    """softmax(q k^T) v over the blocks of a layout; q [H, T, D], k and v [KV, T, D], H a multiple of KV."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: list[Block], scale: float
    ) -> torch.Tensor:
        # [T, H, D] in memory: the layout that the output projection reads.
        out = q.new_empty(q.shape[1], q.shape[0], q.shape[2]).transpose(0, 1)
        weights = []
        with torch.autocast(q.device.type, enabled=False):
            for block in blocks:
                queries, keys, values = _grouped(q, block, k), _seen(k, block), _seen(v, block)
                weight = _weights(queries, keys, block.mask, scale)
                out[:, block.queries] = (weight @ values).view(q.shape[0], -1, q.shape[2])
                weights.append(weight)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for block, weight in zip(ctx.blocks, weights, strict=True):
            queries, keys, values = _grouped(q, block, k), _seen(k, block), _seen(v, block)
            upstream = _grouped(grad, block, k)
            scores = torch._softmax_backward_data(upstream @ values.mT, weight, -1, weight.dtype)
            scores *= ctx.scale
            dq[:, block.queries] = (scores @ keys).view(q.shape[0], -1, q.shape[2])
            _add_seen(dk, block, scores.mT @ queries)
            _add_seen(dv, block, weight.mT @ upstream)
        return dq, dk, dv, None, None


def _grouped(q: torch.Tensor, block: Block, k: torch.Tensor) -> torch.Tensor:
    """Return a block's queries [KV, H / KV * queries, D]: the heads that share a key head stand together."""
    return q[:, block.queries].reshape(k.shape[0], -1, q.shape[2])


def _seen(k: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the keys (or values) that a block sees [KV, keys, D]."""
    if len(block.keys) == 1:
        return k[:, block.keys[0]]
    return torch.cat([k[:, place] for place in block.keys], dim=1)


def _add_seen(total: torch.Tensor, block: Block, part: torch.Tensor) -> None:
    first = 0
    for place in block.keys:
        last = first + place.stop - place.start
        total[:, place] += part[:, first:last]
        first = last


def _weights(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    scores = _product(queries, keys)
    scores *= scale
    by_head = scores.view(scores.shape[0], -1, *mask.shape)
    by_head += mask
    return scores.softmax(-1).to(queries.dtype)


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
    out = _BlockAttention.apply(query[0], key[0], value[0], layout.blocks(sliding_window), scale)
    return out.transpose(0, 1)[None], None


def use_packed_attention(base: Any) -> None:
    """Make a transformers model attend through this module."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    base.set_attn_implementation(PACKED)
