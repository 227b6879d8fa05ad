"""A fused norm is the written-out one: the same numbers, the same gradient, and only where that holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lora_exp.engine.norms import fusable_norms, fused_norms


def norm(width: int, dtype: torch.dtype, kind: type[torch.nn.Module] = LlamaRMSNorm) -> torch.nn.Module:
    made = kind(width).to(dtype).requires_grad_(False)
    made.weight.copy_(torch.randn(width))
    return made


def computed(module: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    out.backward(upstream)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(rows=st.integers(1, 5), width=st.integers(1, 70), size=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 9))
def test_values_and_gradient_are_those_of_the_written_out_norm(
    kind: type[torch.nn.Module], dtype: torch.dtype, rows: int, width: int, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    module = norm(width, dtype, kind)
    x, upstream = (torch.randn(1, rows, width, dtype=dtype) for _ in range(2))
    expected, slope = computed(module, x * size, upstream)
    (found_module,) = fusable_norms(torch.nn.Sequential(module))
    with fused_norms([found_module]):
        found, found_slope = computed(module, x * size, upstream)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    # The gradient is a difference: rounding is a share of what is subtracted, not of what is left.
    inverse = (x.float() * size).pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
    parts = float((upstream * module.weight * inverse).abs().max())
    torch.testing.assert_close(found_slope, slope, rtol=tolerance, atol=tolerance * parts)
    assert "forward" not in vars(module)


def test_autocast_changes_nothing() -> None:
    """It would take the sum of squares in half precision."""
    module = norm(64, torch.bfloat16)
    x, upstream = (torch.randn(1, 5, 64, dtype=torch.bfloat16) for _ in range(2))
    with fused_norms([module]):
        expected = computed(module, x, upstream)
        with torch.autocast("cpu", torch.bfloat16):
            found = computed(module, x, upstream)
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize(
    "module",
    [
        Gemma3RMSNorm(8).requires_grad_(False),  # multiplies by 1 + weight
        LlamaRMSNorm(8),  # its weight trains
        norm(8, torch.float64),  # rounds to float32 on the way
        torch.nn.LayerNorm(8).requires_grad_(False),
    ],
    ids=["gemma", "trained", "float64", "layer norm"],
)
def test_what_computes_something_else_is_left_alone(module: torch.nn.Module) -> None:
    assert fusable_norms(torch.nn.Sequential(module)) == []


def test_a_wider_input_is_computed_as_before() -> None:
    module = norm(8, torch.bfloat16)
    x = torch.randn(3, 8)
    expected = module(x)
    with fused_norms([module]):
        assert torch.equal(module(x), expected)
