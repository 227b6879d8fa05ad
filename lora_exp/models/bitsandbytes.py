"""What this project knows of bitsandbytes' private parts. Read in bitsandbytes 0.50.2, `nn/modules.py`.

Quantised layers here mean one thing on every device, in training and in evaluation: the weight is kept in 8 or 4 bits,
and multiplied in the compute dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt


class WeightOnly8bit(Linear8bitLt):  # type: ignore[misc]
    """An 8-bit layer that multiplies its input with its dequantised weight.

    bitsandbytes computes so while it trains on a CPU or an XPU. Elsewhere it quantises the input too (LLM.int8), and
    takes out a column where any token of the batch is large: another function of the same weights, in which a row's
    numbers depend on the rows beside it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product in the dtype of autocast, or of the input."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            product: torch.Tensor = _Multiplied.apply(x, self)
        return product if bias is None else product + bias

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [out, in]; a row's scale is its largest value, which 127 stands for."""
        scales = self.weight.SCB if self.state.SCB is None else self.state.SCB
        return self.weight.data.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


class _Multiplied(torch.autograd.Function):  # type: ignore[misc]
    """x W^T of a frozen 8-bit layer. The backward pass dequantises W again, so nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: WeightOnly8bit) -> torch.Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.dequantised(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dequantised(grad.dtype), None


def multiply_in_compute_dtype(base: Any) -> None:
    """Have the quantised layers of a model compute the same in training and in evaluation, on every device.

    4-bit layers keep the layout that gradients flow through: on CPUs with AVX512-BF16, bitsandbytes repacks the weight
    of `Linear4bit` at the first forward pass in eval mode, for a kernel that has no backward. Training does not undo
    it: after one evaluation, gradients stop at the first such layer, with a warning at most.
    """
    for module in base.modules():
        if type(module) is Linear8bitLt:
            module.__class__ = WeightOnly8bit
        elif isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
