"""Log-probabilities of scored tokens alone, with the numbers that TRL logs of each, in tiles.

The gradient of a log-probability with regard to the hidden state is computed along with it: W[y] - p W, a row a token,
which the incoming gradient only scales. So the logits are computed once, not again in the backward pass as in TRL 1.16
(`trl/kernels/chunked_logprob.py`), and no [tokens, vocabulary] tensor outlives its tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

TILE_BYTES = 24 * 2**20
"""Of logits at a time, for products with enough rows to run at full rate."""

PIECE_BYTES = {"cpu": 12 * 2**20}
"""Of float32 logits at a time between the two products of a tile: they are read a dozen times, from a processor's last
cache. A whole tile on other devices."""


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
        vocabulary = weight.shape[0]
        tile = hidden.new_empty(_rows(TILE_BYTES, weight.itemsize * vocabulary, hidden), vocabulary, dtype=dtype)
        room = _Room(_rows(PIECE_BYTES.get(device, TILE_BYTES), 4 * vocabulary, tile), tile)
        with torch.autocast(device, enabled=False):
            for part in _slices(len(hidden), len(tile)):
                logits = torch.mm(hidden[part].to(dtype), weight.mT, out=tile[: part.stop - part.start])
                found = [field[part] for field in fields]
                _fold_tile(logits, room, head, targets[part], found, slope is not None, squares)
                if slope is not None:
                    slope[part] = logits @ weight
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


def _rows(wanted: int, row: int, available: torch.Tensor) -> int:
    """Return how many rows of `row` bytes fill `wanted` bytes: at least 16, at most those of `available`."""
    return max(1, min(len(available), max(16, wanted // row)))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


class _Room:
    """Two float32 matrices that every piece of the logits is computed in: fresh ones would be page faults."""

    def __init__(self, rows: int, tile: torch.Tensor) -> None:
        self.wide = None if tile.dtype == torch.float32 else tile.new_empty(rows, tile.shape[1], dtype=torch.float32)
        self.probabilities = tile.new_empty(rows, tile.shape[1], dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.probabilities)

    def widened(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits in float32, to be overwritten, and a place of the same shape."""
        wide = logits if self.wide is None else self.wide[: len(logits)].copy_(logits)
        return wide, self.probabilities[: len(logits)]


def _fold_tile(
    logits: torch.Tensor,
    room: _Room,
    head: Head,
    targets: torch.Tensor,
    fields: Sequence[torch.Tensor],
    slope: bool,
    squares: bool,
) -> None:
    """Write the numbers of a tile's tokens into `fields`, and d log p(target) / d logits over the logits if wanted."""
    if head.bias is not None:
        logits += head.bias.to(logits.dtype)
    for piece in _slices(len(logits), len(room)):
        numbers, dlogits = _fold(*room.widened(logits[piece]), head, targets[piece], slope, squares)
        for field, number in zip(fields, numbers, strict=True):
            field[piece] = number
        if dlogits is not None:
            logits[piece] = dlogits


def _fold(
    z: torch.Tensor, p: torch.Tensor, head: Head, targets: torch.Tensor, slope: bool, squares: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Return the numbers of each row of logits, and d log p(target) / d logits if wanted. Overwrites `z` and `p`."""
    if head.scale != 1.0:
        z *= head.scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    at = targets[:, None]
    chosen = z.gather(1, at)[:, 0]
    largest, first = z.max(-1)  # of equal ones the first, as argmax has it; ties are common in bf16
    mean, is_first = z.mean(-1), first == targets
    # Probabilities below 1e-38 would be subnormal numbers, on which processors are twenty times slower; at e^-80 of
    # the largest they are as far below float32's resolution as before.
    torch.maximum(z, largest[:, None] - 80, out=z)
    # Step by step as TRL does it, so that the sums are rounded alike and the losses agree to the last bit.
    torch.sub(z, largest[:, None], out=p).exp_()
    total = p.sum(-1)
    log_total = largest + total.log()
    products = torch.mul(p, z, out=z) if head.softcap is None else p * z
    entropy = log_total - products.sum(-1) / total
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
