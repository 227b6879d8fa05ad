"""A frozen layer, plain or quantised, and its adapter computed as one are the two computed one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

from lora_exp.engine.dropout import dropped_places, zeroed
from lora_exp.engine.peft import fused_lora
from lora_exp.models.bitsandbytes import multiply_in_compute_dtype
from lora_exp.preflight.live import LiveBytes

IN, OUT = 64, 32
KINDS = ("plain", "8bit", "nf4", "fp4", "nf4 twice")
NUMBERS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Dtypes, and how far the order of sums may move a result of size one."""


def layer(kind: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0, **lora: Any) -> Any:
    """Return PEFT's layer over one of this kind, with a bias."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(IN, OUT, dtype=dtype)
    if kind == "8bit":
        base = Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=6.0)
    elif kind != "plain":
        base = Linear4bit(IN, OUT, compute_dtype=dtype, quant_type=kind[:3], compress_statistics="twice" in kind)
    if kind != "plain":
        base.load_state_dict(plain.state_dict())
        plain = base.to("cpu")
    holder = torch.nn.ModuleDict({"proj": plain.requires_grad_(False)})
    multiply_in_compute_dtype(holder)
    holder.is_loaded_in_8bit, holder.is_loaded_in_4bit = kind == "8bit", kind not in ("plain", "8bit")
    config = LoraConfig(r=4, target_modules=["proj"], lora_dropout=dropout, init_lora_weights=False, **lora)
    inject_adapter_in_model(config, holder)
    for name, parameter in holder.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return holder["proj"].train()


def passed(out: torch.Tensor, module: Any, leaf: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    trained = [each for each in module.parameters() if each.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, [leaf, *trained], upstream)]


def close(found: list[torch.Tensor], expected: list[torch.Tensor], bound: float) -> None:
    assert len(found) == len(expected)
    for each, right in zip(found, expected, strict=True):
        assert each.dtype == right.dtype
        assert (each.float() - right.float()).norm() <= bound * max(right.float().norm(), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NUMBERS)
@given(tokens=st.integers(1, 5), size=st.sampled_from([1e-2, 1.0, 30.0]), seed=st.integers(0, 9))
def test_value_and_gradients_are_those_of_peft(
    kind: str, dtype: torch.dtype, tokens: int, size: float, seed: int
) -> None:
    module = layer(kind, dtype)
    torch.manual_seed(seed)
    leaf = (torch.randn(1, tokens, IN, dtype=dtype) * size).requires_grad_()
    upstream = torch.randn(1, tokens, OUT, dtype=dtype)
    expected = passed(module(leaf), module, leaf, upstream)
    with fused_lora(module):
        assert "forward" in vars(module), "it was left as it is"
        out = module(leaf)
    close(passed(out, module, leaf, upstream), expected, NUMBERS[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_layer_sees_what_its_adapter_does_not(kind: str) -> None:
    module = layer(kind, dropout=0.3)
    leaf, upstream = torch.randn(1, 7, IN, requires_grad=True), torch.randn(1, 7, OUT)
    torch.manual_seed(5)
    with fused_lora(module):
        out = module(leaf)
    torch.manual_seed(5)
    seen = leaf * zeroed(torch.ones_like(leaf), dropped_places(leaf.numel(), 0.3)) / (1 - 0.3)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    wanted = module.base_layer(leaf) + module.scaling["default"] * seen @ a.mT @ b.mT
    close(passed(out, module, leaf, upstream), passed(wanted, module, leaf, upstream), 2e-6)


@pytest.mark.parametrize("kind", ["plain", "8bit", "nf4"])
def test_layer_and_adapter_keep_their_input_once(kind: str) -> None:
    module = layer(kind, dropout=0.3)
    tokens = 1000
    x = torch.randn(1, tokens, IN, requires_grad=True)
    with fused_lora(module), LiveBytes([x, *module.parameters(), *module.buffers()]) as live:
        module(x)  # whatever a layer unpacks at its first pass
        before = live.now
        out = module(x)
    assert out.requires_grad
    places = 8 * tokens * IN * 0.33  # dropped ones, a tenth more than expected
    assert live.now - before <= 4 * tokens * (OUT + module.r["default"]) + places


@pytest.mark.parametrize("kind", ["plain", "8bit", "nf4"])
def test_a_bias_that_trains_has_its_gradient(kind: str) -> None:
    module = layer(kind)
    module.base_layer.bias.requires_grad_()
    leaf, upstream = torch.randn(3, IN, requires_grad=True), torch.randn(3, OUT)
    expected = passed(module(leaf), module, leaf, upstream)
    with fused_lora(module):
        found = passed(module(leaf), module, leaf, upstream)
    close(found, expected, 2e-6)


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_in_evaluation_a_quantised_layer_is_peft_s(kind: str) -> None:
    """bitsandbytes itself computes in other ways there: with packed weights, and with a quantised input."""
    module = layer(kind, torch.bfloat16).eval()
    x = torch.randn(1, 3, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = module(x)
        with fused_lora(module):
            close([module(x)], [expected], NUMBERS[torch.bfloat16])


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_a_base_keeps_its_dtype_where_the_adapter_has_another(kind: str) -> None:
    """A base in float32 with adapters in bf16, as TRL has them where the base is quantised: bit for bit PEFT's sum."""
    module = layer(kind)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16) if parameter.requires_grad else parameter.data
    leaf, upstream = torch.randn(1, 3, IN, requires_grad=True), torch.randn(1, 3, OUT)
    expected = passed(module(leaf), module, leaf, upstream)
    with fused_lora(module):
        found = passed(module(leaf), module, leaf, upstream)
    for each, right in zip(found, expected, strict=True):
        assert torch.equal(each, right)


def test_a_layer_that_computes_in_another_format_is_left_to_do_so() -> None:
    module = layer("nf4", torch.bfloat16)
    module.base_layer.compute_dtype = torch.float32
    leaf, upstream = (torch.randn(1, 3, size, dtype=torch.bfloat16) for size in (IN, OUT))
    leaf.requires_grad_()
    expected = passed(module(leaf), module, leaf, upstream)
    with fused_lora(module):
        found = passed(module(leaf), module, leaf, upstream)
    close(found, expected, 2e-2)
