"""What this project knows of PEFT's private parts. Read in peft 0.21.2, `tuners/lora/layer.py`.

PEFT adds an adapter as `result + lora_B(lora_A(x)) * scaling`: under autocast the input is widened to float32 and
narrowed again, and scaling and sum are each a pass over the output, forward and backward. Here the second product
adds onto the result, and the scaling rides along; the adapter's part of the input's gradient adds onto the frozen
layer's (`engine/frozen.py`). Dropout keeps no copy of its input (`engine/dropout.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant

from lora_exp.engine import frozen
from lora_exp.engine.dropout import dropped_places, zeroed


@contextmanager
def fused_lora(model: torch.nn.Module) -> Iterator[None]:
    """Compute the plain LoRA adapters of a model in fewer passes within the block.

    DoRA and the other variants are left as they are. Backward passes may follow after the block.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    whole = [layer for layer in layers if _is_one_operation(layer)]
    changed = [(layer, name) for layer in layers for name in layer.active_adapters if _is_plain(layer, name)]
    casts = [layer.cast_input_dtype_enabled for layer, _ in changed]
    for layer, name in changed:
        layer.lora_variant[name] = _Fused()
        layer.cast_input_dtype_enabled = False
    for layer in whole:
        layer.forward = partial(_adapted, layer)
    try:
        yield
    finally:
        for layer in whole:
            del layer.forward
        for (layer, name), cast in zip(changed, casts, strict=True):
            del layer.lora_variant[name]
            layer.cast_input_dtype_enabled = cast


def _is_one_operation(layer: Any) -> bool:
    """Whether a layer is a frozen linear one with just one plain adapter at work, which can share its backward pass."""
    return (
        type(layer.base_layer) is frozen.adapted_types().get(type(layer))
        and frozen.is_frozen(layer.base_layer)
        and not layer.disable_adapters
        and not layer.merged
        and len(layer.active_adapters) == 1
        and _is_plain(layer, layer.active_adapters[0])
    )


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
        dtype = _compute_dtype(module, active_adapter, x)
        if result.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            return _added_in_its_dtype(module, active_adapter, x.to(dtype), result)
        x, dropped, kept = _drop(module.lora_dropout[active_adapter], x.to(dtype))
        return _with_adapter(module, active_adapter, result.to(dtype), x, dropped, kept)


def _adapted(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute base and adapter of a layer."""
    (name,) = layer.active_adapters
    dtype = _compute_dtype(layer, name, x)
    one_dtype = x.dtype == dtype and frozen.computes_in(layer.base_layer, dtype)
    if not one_dtype and not torch.is_autocast_enabled(x.device.type):
        mixed: torch.Tensor = type(layer).forward(layer, x)
        return mixed
    x = x.to(dtype)
    seen, dropped, kept = _drop(layer.lora_dropout[name], x)
    if seen is not x:  # the adapter's input has a gradient of its own
        return _with_adapter(layer, name, layer.base_layer(x), seen, dropped, kept)
    return _with_adapter(layer, name, None, x, dropped, kept)


def _added_in_its_dtype(layer: Any, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Return what PEFT does where an adapter has another dtype than its base's result, which keeps its own.

    On a quantised base TRL has the adapter in bf16, whatever the base computes in.
    """
    added = layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x))) * layer.scaling[name]
    summed: torch.Tensor = result + added.to(result.dtype)
    return summed


def _compute_dtype(layer: Any, name: str, x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = layer.lora_A[name].weight.dtype
    return dtype


def _with_adapter(
    layer: Any,
    name: str,
    result: torch.Tensor | None,
    x: torch.Tensor,
    dropped: torch.Tensor | None,
    kept: float,
) -> torch.Tensor:
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    base = layer.base_layer if result is None else None
    with torch.autocast(x.device.type, enabled=False):
        added: torch.Tensor = _AddLora.apply(result, x, a, b, layer.scaling[name] / kept, dropped, base)
    return added


def _drop(dropout: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Return the adapter's input, what of it is still to be dropped, and the share that is kept."""
    if not (
        isinstance(dropout, torch.nn.Dropout) and dropout.training and x.device.type == "cpu" and 0 < dropout.p < 1
    ):
        return dropout(x), None, 1.0
    return x, dropped_places(x.numel(), dropout.p), 1 - dropout.p


class _AddLora(torch.autograd.Function):  # type: ignore[misc]
    """result + scaling * x A^T B^T, written over `result`; x is 0 at the places in `dropped`.

    Without a result it is that of `base`, a frozen linear layer, computed here from `x` (not dropped), and its
    gradient with the adapter's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor | None,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropped: torch.Tensor | None,
        base: torch.nn.Module | None,
    ) -> torch.Tensor:
        if result is None:
            result = frozen.product(base, x)
        else:
            ctx.mark_dirty(result)
        narrow_a, narrow_b = a.to(x.dtype), b.to(x.dtype)
        middle = (x if dropped is None else zeroed(x, dropped)) @ narrow_a.mT
        result.view(-1, result.shape[-1]).addmm_(middle.view(-1, middle.shape[-1]), narrow_b.mT, alpha=scaling)
        ctx.save_for_backward(x, middle, narrow_a, narrow_b, dropped)
        ctx.scaling, ctx.dtype, ctx.base = scaling, a.dtype, base
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
        dx = _input_slope(flat, dmiddle, a, dropped, ctx.base).view(x.shape) if ctx.needs_input_grad[1] else None
        return grad if ctx.base is None else None, dx, da.to(ctx.dtype), db.to(ctx.dtype), None, None, None


def _input_slope(
    grad: torch.Tensor,
    dmiddle: torch.Tensor,
    a: torch.Tensor,
    dropped: torch.Tensor | None,
    base: torch.nn.Module | None,
) -> torch.Tensor:
    """Return the gradient [T, in] through the adapter, and through the base where it is given."""
    through_base = None if base is None else grad @ frozen.weight(base, grad.dtype)
    if through_base is not None and dropped is None:
        return through_base.addmm_(dmiddle, a)
    slope = dmiddle @ a
    if dropped is not None:
        slope.view(-1).index_fill_(0, dropped, 0)
    return slope if through_base is None else slope.add_(through_base)
