"""What counts as a model that takes no flat row, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_exp.engine import attention, forward
from lora_exp.engine.probe import Probe


def model_that(does: Callable[[], Any]) -> Any:
    """Return a small model that does something within a layer's forward pass."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.model.layers[0].register_forward_pre_hook(lambda *_: does() and None)
    return model


def probe(model: Any) -> str | None:
    return Probe(model, 20, "float32", no_dropout=False).reason()


class _Backward(torch.autograd.Function):
    """The identity, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slope: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.slope = slope
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.slope(grad), None


def model_whose_backward(slope: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a small model with a layer whose gradient goes through `slope` where rows are packed."""
    model = model_that(lambda: None)

    def through(_: Any, __: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        return _Backward.apply(output, slope) if kwargs.get("layout") is not None else output

    model.model.layers[0].register_forward_hook(through, with_kwargs=True)
    return model


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_a_model_that_takes_a_flat_row_is_packed() -> None:
    model = model_that(lambda: None)
    assert probe(model) is None
    assert model.config._attn_implementation == attention.PACKED


@pytest.mark.parametrize("kind", [AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError])
def test_what_the_models_own_code_raises_is_the_reason(kind: type[Exception]) -> None:
    model = model_that(raising(kind("no such mask")))
    before = model.config._attn_implementation
    assert probe(model) == "llama: no such mask"
    assert model.config._attn_implementation == before


def test_memory_that_runs_out_is_no_reason() -> None:
    with pytest.raises(RuntimeError, match="memory"):
        probe(model_that(lambda: torch.empty(2**60)))
    with pytest.raises(torch.OutOfMemoryError):
        probe(model_that(raising(torch.OutOfMemoryError("full"))))


@pytest.mark.parametrize("name", ["Layout", "fused_lora"])
def test_a_mistake_of_ours_is_no_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: calling our own function with an argument that it does not have."""
    monkeypatch.setattr(forward, name, partial(getattr(forward, name), no_such_argument=1))
    with pytest.raises(TypeError, match="no_such_argument"):
        probe(model_that(lambda: None))


@pytest.mark.parametrize("slope", [torch.zeros_like, lambda grad: grad * float("nan"), lambda grad: grad * 1.01])
def test_a_wrong_gradient_is_a_reason(slope: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Hidden states alone would show nothing: the forward pass is the same."""
    reason = probe(model_whose_backward(slope))
    assert reason is not None
    assert "hidden states off by 0.0%" in reason


def test_a_backward_pass_that_a_library_refuses_is_the_reason() -> None:
    refused = RuntimeError("no valid triton configs")
    assert probe(model_whose_backward(raising(refused))) == "llama: no valid triton configs"


def test_memory_that_runs_out_in_a_backward_pass_is_no_reason() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        probe(model_whose_backward(raising(torch.OutOfMemoryError("full"))))


def test_a_right_gradient_is_none() -> None:
    assert probe(model_whose_backward(lambda grad: grad)) is None
