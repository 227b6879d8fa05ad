"""What this project knows of PEFT's private parts. Read in peft 0.21.2, `tuners/lora/layer.py`.

PEFT adds an adapter as `result + lora_B(lora_A(x)) * scaling`: under autocast the input is widened to float32 and
narrowed again, and scaling and sum are each a pass over the output, forward and backward. Here the second product
adds onto the result, and the scaling rides along. Dropout keeps no copy of its input (`engine/dropout.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant

from lora_exp.engine.dropout import dropped_places, zeroed


@contextmanager
def fused_lora(model: torch.nn.Module) -> Iterator[None]:
    """Compute the plain LoRA adapters of a model in fewer passes within the block.

    DoRA and the other variants are left as they are. Backward passes may follow after the block.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    changed = [(layer, name) for layer in layers for name in layer.active_adapters if _is_plain(layer, name)]
    casts = [layer.cast_input_dtype_enabled for layer, _ in changed]
    for layer, name in changed:
        layer.lora_variant[name] = _Fused()
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for (layer, name), cast in zip(changed, casts, strict=True):
            del layer.lora_variant[name]
            layer.cast_input_dtype_enabled = cast


def _is_plain(layer: Any, name: str) -> bool:
    return (
        name in layer.lora_A
        and name not in layer.lora_variant
        and type(layer.lora_A[name]) is type(layer.lora_B[name]) is torch.nn.Linear
        and layer.lora_B[name].bias is None
    )


class _Fused(LoraVariant):  # type: ignore[misc]
    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
        x, dropped, kept = _drop(module.lora_dropout[active_adapter], x.to(dtype))
        with torch.autocast(device, enabled=False):
            scaling = module.scaling[active_adapter] / kept
            added: torch.Tensor = _AddLora.apply(result.to(dtype), x, a, b, scaling, dropped)
        return added


def _drop(dropout: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Return the adapter's input, what of it is still to be dropped, and the share that is kept."""
    if not (
        isinstance(dropout, torch.nn.Dropout) and dropout.training and x.device.type == "cpu" and 0 < dropout.p < 1
    ):
        return dropout(x), None, 1.0
    return x, dropped_places(x.numel(), dropout.p), 1 - dropout.p


class _AddLora(torch.autograd.Function):  # type: ignore[misc]
    """result + scaling * x A^T B^T, written over `result`; x is 0 at the places in `dropped`."""

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropped: torch.Tensor | None,
    ) -> torch.Tensor:
        narrow_a, narrow_b = a.to(x.dtype), b.to(x.dtype)
        middle = (x if dropped is None else zeroed(x, dropped)) @ narrow_a.mT
        result.view(-1, result.shape[-1]).addmm_(middle.view(-1, middle.shape[-1]), narrow_b.mT, alpha=scaling)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, middle, narrow_a, narrow_b, dropped)
        ctx.scaling, ctx.dtype = scaling, a.dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, middle, a, b, dropped = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        dmiddle = (flat @ b) * ctx.scaling
        seen = x if dropped is None else zeroed(x, dropped)
        da = dmiddle.mT @ seen.reshape(-1, x.shape[-1])
        # Few rows by many columns: the transposed product is a third slower.
        db = (middle.view(-1, middle.shape[-1]).mT @ flat).mT * ctx.scaling
        dx = None
        if ctx.needs_input_grad[1]:
            dx = dmiddle @ a
            dx = (dx if dropped is None else dx.view(-1).index_fill_(0, dropped, 0)).view(x.shape)
        return grad, dx, da.to(ctx.dtype), db.to(ctx.dtype), None, None
