"""What a frozen linear layer multiplies with, plain or quantised. Read in bitsandbytes 0.50, `autograd/_functions.py`.

Quantised layers compute their input's gradient as `grad @ weight`, with the weight dequantised once more. With that
weight, the gradients of the base and of its adapter are computed together, and the layer keeps no input.
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
        from bitsandbytes.nn import Linear4bit
        from peft.tuners.lora import bnb

        from lora_exp.models.bitsandbytes import WeightOnly8bit

        types |= {bnb.Linear4bit: Linear4bit, bnb.Linear8bitLt: WeightOnly8bit}
    return types


def is_frozen(base: Any) -> bool:
    """Whether nothing of a linear layer trains."""
    return not any(parameter.requires_grad for parameter in base.parameters())


def computes_in(base: Any, dtype: torch.dtype) -> bool:
    """Whether a linear layer multiplies in a dtype where its input has it."""
    kind = get_bnb_param_type(base.weight)
    if kind == "4bit":
        return bool(base.compute_dtype in (dtype, None))
    return bool(kind == "8bit" or base.weight.dtype == dtype)


def product(base: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what a linear layer makes of `x`, in the dtype of `x`, with nothing kept for a backward pass."""
    with torch.no_grad():
        if get_bnb_param_type(base.weight):
            quantised: torch.Tensor = base(x)
            return quantised
        return torch.nn.functional.linear(
            x, base.weight.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype)
        )


def weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a linear layer's weight [out, in] in a dtype, as its own backward pass has it."""
    kind = get_bnb_param_type(base.weight)
    if kind == "8bit":
        dequantised: torch.Tensor = base.dequantised(dtype)
        return dequantised
    found: torch.Tensor = dequantize_bnb_weight(base.weight) if kind == "4bit" else base.weight
    return found.to(dtype)
