"""What a frozen linear layer multiplies with, plain or quantised. Read in bitsandbytes 0.50, `autograd/_functions.py`.

bitsandbytes' layers compute their input's gradient as `grad @ weight`, with the weight dequantised once more. Whoever
knows that weight can compute the gradient together with another one, and need not have the layer keep its input.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type


def adapted_types() -> dict[type[torch.nn.Module], type[torch.nn.Module]]:
    """Return PEFT's layers that adapt a linear one, each with the one that it adapts."""
    types: dict[type[torch.nn.Module], type[torch.nn.Module]] = {Linear: torch.nn.Linear}
    if "bitsandbytes" in sys.modules:  # else no layer is one of its own, and it takes a second to import
        from bitsandbytes.nn import Linear4bit, Linear8bitLt
        from peft.tuners.lora import bnb

        types |= {bnb.Linear4bit: Linear4bit, bnb.Linear8bitLt: Linear8bitLt}
    return types


def is_frozen(base: Any) -> bool:
    """Whether nothing of a linear layer trains, and its weight stays in a form that is known here."""
    if any(parameter.requires_grad for parameter in base.parameters()):
        return False
    kind = get_bnb_param_type(base.weight)
    # In evaluation, a 4-bit layer packs its weight for another kernel; an 8-bit one may keep the weight as it was.
    return bool(base.training) if kind == "4bit" else kind != "8bit" or not base.state.has_fp16_weights


def computes_in(base: Any, dtype: torch.dtype) -> bool:
    """Whether a linear layer multiplies in a number format where its input has it."""
    kind = get_bnb_param_type(base.weight)
    if kind == "4bit":
        return bool(base.compute_dtype in (dtype, None))
    return bool(kind == "8bit" or base.weight.dtype == dtype)


def product(base: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what a linear layer makes of `x`, in the number format of `x`, with nothing kept for a backward pass."""
    with torch.no_grad():
        if get_bnb_param_type(base.weight):
            quantised: torch.Tensor = base(x)
            return quantised
        return torch.nn.functional.linear(
            x, base.weight.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype)
        )


def weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a linear layer's weight [out, in] in a number format, in the way of its own backward pass."""
    kind = get_bnb_param_type(base.weight)
    if kind == "8bit":
        scales = base.state.SCB.unsqueeze(1).mul(1.0 / 127.0)
        return base.state.CB.to(dtype, copy=True).mul_(scales)
    found: torch.Tensor = dequantize_bnb_weight(base.weight) if kind == "4bit" else base.weight
    return found.to(dtype)
