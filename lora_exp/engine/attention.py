"""Attention over a flat row in which each token sees its own rows' past and nothing else.

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
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_exp.engine import flex
from lora_exp.engine.layout import Block, Layout

PACKED = "packed"
"""The name under which transformers knows this attention."""

REFUSED = ("softcap", "s_aux", "position_bias", "sinks")
"""Arguments with which some architectures change the scores; not computed here."""


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
    query, key, value = (_as_autocast(each) for each in (query, key, value))
    if flex.suits(query):
        mask = layout.flex_mask(sliding_window)
        attended_by_kernel, _ = flex_attention_forward(module, query, key, value, mask, scaling=scale)
        return attended_by_kernel, None
    rows = (each[0].transpose(0, 1) for each in (query, key, value))
    return _BlockAttention.apply(*rows, layout.blocks(sliding_window), scale)[None], None


def _as_autocast(part: torch.Tensor) -> torch.Tensor:
    """Return it in the dtype in which autocast has torch's own attention compute: a float32 base gives several."""
    device = part.device.type
    if part.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return part
    return part.to(torch.get_autocast_dtype(device))


def use_packed_attention(base: Any) -> None:
    """Make a transformers model attend through this module."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    base.set_attn_implementation(PACKED)
