"""What counts as a model that takes no flat row, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_exp.engine import attention, forward
from lora_exp.engine.support import _of_probe


def model_that(does: Callable[[], Any]) -> Any:
    """Return a small model that does something within a layer's forward pass."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.model.layers[0].register_forward_pre_hook(lambda *_: does() and None)
    return model


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_a_model_that_takes_a_flat_row_is_packed() -> None:
    model = model_that(lambda: None)
    assert _of_probe(model, 20, False) is None
    assert model.config._attn_implementation == attention.PACKED


@pytest.mark.parametrize("kind", [AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError])
def test_what_the_models_own_code_raises_is_the_reason(kind: type[Exception]) -> None:
    model = model_that(raising(kind("no such mask")))
    before = model.config._attn_implementation
    assert _of_probe(model, 20, False) == "llama: no such mask"
    assert model.config._attn_implementation == before


def test_memory_that_runs_out_is_no_reason() -> None:
    with pytest.raises(RuntimeError, match="memory"):
        _of_probe(model_that(lambda: torch.empty(2**60)), 20, False)
    with pytest.raises(torch.OutOfMemoryError):
        _of_probe(model_that(raising(torch.OutOfMemoryError("full"))), 20, False)


@pytest.mark.parametrize("name", ["Layout", "fused_lora"])
def test_a_mistake_of_ours_is_no_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: calling our own function with an argument that it does not have."""
    monkeypatch.setattr(forward, name, partial(getattr(forward, name), no_such_argument=1))
    with pytest.raises(TypeError, match="no_such_argument"):
        _of_probe(model_that(lambda: None), 20, False)
