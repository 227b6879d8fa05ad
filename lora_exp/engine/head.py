"""Log-probabilities of scored tokens alone, with the numbers that TRL logs of each, in tiles.

The gradient of a log-probability with regard to the hidden state is computed along with it: W[y] - p W, a row a token,
which the incoming gradient only scales. So the logits are computed once, not again in the backward pass as in TRL 1.16
(`trl/kernels/chunked_logprob.py`), and no [tokens, vocabulary] tensor outlives its tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

TILE_BYTES = 24 * 2**20
"""Of float32 logits at a time: what a processor's last cache holds."""


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: `softcap(scale * (hidden W^T + bias))`.

    Args:
        weight: [vocabulary, hidden]. Frozen.
        bias: [vocabulary], or None.
        scale: Factor before the cap (Cohere, Granite and others); 1.0 for most.
        softcap: `cap * tanh(x / cap)` (Gemma 2), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class TokenScores:
    """A number a scored token [S], named as in `trl.trainer.utils.FusedCausalLMOutput`; float32 as there."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor
    log_sum_sq_probs: torch.Tensor


def score_tokens(hidden: torch.Tensor, head: Head, targets: torch.Tensor, squares: bool = False) -> TokenScores:
    """Score a target token at each hidden state.

    Only `log_probs` has a gradient, and only towards `hidden`.

    Args:
        hidden: [S, hidden].
        head: The output layer.
        targets: Token ids [S].
        squares: Whether `log_sum_sq_probs` is wanted; 0 otherwise.
    """
    return TokenScores(*_ScoreTokens.apply(hidden, head, targets, squares))


class _ScoreTokens(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Head, targets: torch.Tensor, squares: bool
    ) -> tuple[torch.Tensor, ...]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        weight = head.weight.to(dtype)
        slope = hidden.new_empty(hidden.shape) if ctx.needs_input_grad[0] else None
        fields = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(5)]
        fields[3] = fields[3].bool()
        rows = max(16, TILE_BYTES // (4 * weight.shape[0]))
        with torch.autocast(device, enabled=False):
            for first in range(0, len(hidden), rows):
                part = slice(first, first + rows)
                logits = hidden[part].to(dtype) @ weight.mT
                if head.bias is not None:
                    logits += head.bias.to(dtype)
                numbers, dlogits = _fold(logits.float(), head, targets[part], slope is not None, squares)
                for field, number in zip(fields, numbers, strict=True):
                    field[part] = number
                if slope is not None and dlogits is not None:
                    slope[part] = logits.copy_(dlogits) @ weight
        if slope is not None:
            ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(*fields[1:])
        ctx.set_materialize_grads(False)
        return tuple(fields)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(slope.dtype), None, None, None


def _fold(
    z: torch.Tensor, head: Head, targets: torch.Tensor, slope: bool, squares: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Return the numbers of each row of logits, and d log p(target) / d logits if wanted. Overwrites `z`."""
    if head.scale != 1.0:
        z *= head.scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    at = targets[:, None]
    chosen = z.gather(1, at)[:, 0]
    largest = z.amax(-1)
    mean, is_first = z.mean(-1), _is_first(z, targets, chosen >= largest)
    # Probabilities below 1e-38 would be subnormal numbers, on which processors are twenty times slower; at e^-80 of
    # the largest they are as far below float32's resolution as before.
    torch.maximum(z, largest[:, None] - 80, out=z)
    # Step by step as TRL does it, so that the sums are rounded alike and the losses agree to the last bit.
    p = torch.sub(z, largest[:, None]).exp_()
    total = p.sum(-1)
    log_total = largest + total.log()
    entropy = log_total - (p * z).sum(-1) / total
    p /= total[:, None]
    numbers = chosen - log_total, entropy, mean, is_first, _log_sum_squares(p) if squares else torch.zeros_like(mean)
    if not slope:
        return numbers, None
    dlogits = p.scatter_add_(1, at, torch.full_like(chosen[:, None], -1.0)).neg_()
    if head.softcap is not None:
        dlogits *= 1 - (z / head.softcap) ** 2
    return numbers, dlogits.mul_(head.scale) if head.scale != 1.0 else dlogits


def _log_sum_squares(p: torch.Tensor) -> torch.Tensor:
    bounded = p.clamp_min(1e-17)  # the square of less would be subnormal; the sum is at least 1 / vocabulary^2
    return torch.linalg.vecdot(bounded, bounded).log()


def _is_first(z: torch.Tensor, targets: torch.Tensor, is_largest: torch.Tensor) -> torch.Tensor:
    """Return where the target is the first of the largest logits, as argmax would have it; ties are common in bf16."""
    rows = is_largest.nonzero()[:, 0]
    first = is_largest.clone()
    first[rows] = z[rows].argmax(-1) == targets[rows]
    return first
