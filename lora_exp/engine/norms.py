"""RMS normalisation of a frozen model in fewer passes over memory.

transformers writes it out (`LlamaRMSNorm` and some 140 classes like it, read in transformers 5.23): widen, square,
mean, scale, narrow, multiply, each a pass, and two or three more of each in the backward pass. A norm was an eighth of
a step where products are fast. Here autograd sees one operation that keeps its input and a number a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from lora_exp.engine.replaced import replaced

NARROW = (torch.bfloat16, torch.float16, torch.float32)
"""Number formats for which the classes compute in float32; float64 they round to it, and are left as they are."""


def fusable_norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules that compute `weight * x / rms(x)`, found out on random numbers, with a frozen weight."""
    return [module for module in model.modules() if _looks_like_one(module) and _is_one(module)]


def _looks_like_one(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and hasattr(module, "variance_epsilon")
        and isinstance(weight, torch.Tensor)
        and weight.ndim == 1
        and not weight.requires_grad
        and weight.dtype in NARROW
        and [name for name, _ in module.named_parameters()] == ["weight"]
    )


def _is_one(module: Any) -> bool:
    weight = module.weight
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    x = torch.randn(8, len(weight), generator=generator).to(weight)
    with torch.no_grad():
        expected, found = module(x), rms_norm(x, weight, module.variance_epsilon)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return expected.dtype == found.dtype and bool(torch.allclose(expected, found, rtol=tolerance, atol=0))


def fused_norms(modules: Sequence[torch.nn.Module]) -> AbstractContextManager[None]:
    """Compute these modules by `rms_norm` within the block; backward passes may follow after it."""
    return replaced(modules, _forward_of)


def _forward_of(module: Any) -> Any:
    written_out = module.forward

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != module.weight.dtype:
            widened: torch.Tensor = written_out(hidden_states)
            return widened
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)

    return forward


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return `weight * x / sqrt(mean(x^2) + eps)` (arXiv 1910.07467, equation 4), computed in float32.

    Args:
        x: [..., hidden].
        weight: [hidden], in the number format of `x`. It gets no gradient.
        eps: Added to the mean square.
    """
    normed: torch.Tensor = _RmsNorm.apply(x, weight, eps)
    return normed


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):  # it would take the sum of squares in half precision
            wide = x.to(torch.float32)
            inverse = torch.linalg.vecdot(wide, wide)[..., None].div_(x.shape[-1]).add_(eps).rsqrt_()
            ctx.save_for_backward(x, weight, inverse)
            return (wide * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        slope = _slope_by_kernel if x.device.type == "cpu" and x.dtype in NARROW else _slope
        return slope(grad, x, weight, inverse), None, None


def _slope(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return the gradient with regard to `x`: d/dx_j of x_i r(x) is r (i = j) - x_i x_j r^3 / n, with r = `inverse`."""
    wide = x.to(torch.float32)
    slope = (grad * weight).to(torch.float32)
    along = torch.linalg.vecdot(slope, wide)[..., None].mul_(inverse**3).div_(-x.shape[-1])
    return slope.mul_(inverse).addcmul_(wide, along).to(x.dtype)


def _slope_by_kernel(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return the same from layer normalisation's kernel, in one pass over memory.

    Told that the mean is 0, it still takes away r times the mean of `grad * weight`, which is put back.
    """
    size = x.shape[-1]
    kernel = torch.ops.aten.native_layer_norm_backward
    without_mean = torch.zeros_like(inverse)
    slope: torch.Tensor = kernel(
        grad.contiguous(), x, [size], without_mean, inverse, weight.to(torch.float32), None, [True, False, False]
    )[0]
    means = torch.matmul(grad, weight)[..., None].to(torch.float32)
    return slope.add_(means.mul_(inverse).div_(size).to(x.dtype))
