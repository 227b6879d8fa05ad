"""Quantised layers: weights in 8 or 4 bits, multiplied in the compute dtype, in training as in evaluation."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes.autograd._functions as functions
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from lora_exp.models.bitsandbytes import WeightOnly8bit, multiply_in_compute_dtype

IN, OUT = 64, 32


def eight(changed: bool = True, bias: bool = False) -> Any:
    """Return a model of one layer, as transformers loads it; `changed` as a run has it."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(IN, OUT, bias=bias)
    layer = Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(plain.state_dict())
    model = torch.nn.Sequential(layer.to("cpu")).requires_grad_(False)
    if changed:
        multiply_in_compute_dtype(model)
    return model


def change_of_a_row(model: Any) -> float:
    """Return how far a row's output moves when the row beside it has a large value."""
    torch.manual_seed(1)
    x = torch.randn(2, IN)
    alone = model(x)[0]
    x[1, ::3] = 20.0
    return float((model(x)[0] - alone).norm() / alone.norm())


def test_bitsandbytes_in_evaluation_depends_on_the_rows_beside() -> None:
    """What the class of our own is for; if bitsandbytes changes this, it can go."""
    with torch.no_grad():
        assert change_of_a_row(eight(changed=False).eval()) > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_a_row_does_not_depend_on_the_rows_beside_it(training: bool) -> None:
    with torch.no_grad():
        assert change_of_a_row(eight().train(training)) == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_one_with_the_dequantised_weight(training: bool, dtype: torch.dtype, bias: bool) -> None:
    model = eight(bias=bias).train(training)
    layer = model[0]
    weight = layer.weight.data.to(dtype) * (layer.weight.SCB / 127)[:, None].to(dtype)
    x = torch.randn(3, 5, IN, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 5, OUT, dtype=dtype)
    expected = torch.nn.functional.linear(x, weight) + (layer.bias.to(dtype) if bias else 0)
    found = model(x)
    bound = {torch.float32: 1e-6}.get(dtype, 2e-2)
    assert found.dtype == dtype
    assert (found - expected).norm() <= bound * expected.norm()
    (slope,), (right,) = (torch.autograd.grad(each, [x], upstream) for each in (found, expected))
    assert (slope - right).norm() <= bound * right.norm()


def test_numbers_are_those_of_bitsandbytes_training_on_a_cpu() -> None:
    plain, changed = eight(changed=False).train(), eight().train()
    x = torch.randn(3, IN, requires_grad=True)
    found, expected = changed(x), plain(x)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(each.sum(), [x])[0] for each in (found, expected)))


def test_no_kernel_of_llm_int8_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither way of bitsandbytes, so CUDA's cannot come in."""

    def called(*_: Any) -> None:
        raise AssertionError("bitsandbytes multiplied")

    monkeypatch.setattr(functions.MatMul8bitLt, "apply", called)
    monkeypatch.setattr(functions.MatMul8bitFp, "apply", called)
    x = torch.randn(3, IN, requires_grad=True)
    for training in (True, False):
        eight().train(training)(x).sum().backward()


def test_autocast_decides_the_compute_dtype() -> None:
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = eight()(x)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_a_copy_of_a_model_keeps_the_class() -> None:
    assert type(copy.deepcopy(eight())[0]) is WeightOnly8bit


def test_an_evaluation_leaves_a_4_bit_layer_trainable() -> None:
    layer = Linear4bit(IN, OUT, bias=False, compute_dtype=torch.bfloat16).to("cpu")
    model = torch.nn.Sequential(layer).requires_grad_(False)
    multiply_in_compute_dtype(model)
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        evaluated = model.eval()(x)
    x.requires_grad_()
    trained = model.train()(x)
    trained.sum().backward()
    assert x.grad is not None
    assert torch.equal(evaluated, trained)
