"""A gated MLP that keeps less is the written-out one, to the last bit, and only what is such a one is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Qwen3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from lora_exp.engine.gated_mlp import fusable_mlps, fused_mlps
from lora_exp.engine.peft import fused_lora
from lora_exp.preflight.live import LiveBytes

HIDDEN, WIDE = 32, 24
KINDS: dict[str, tuple[type[torch.nn.Module], type[Any]]] = {
    "llama": (LlamaMLP, LlamaConfig),
    "qwen3": (Qwen3MLP, Qwen3Config),
    "gemma3": (Gemma3MLP, Gemma3TextConfig),
}


def mlp(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """Return an MLP with trained adapters, which drop some of their input."""
    module, config = KINDS[kind]
    holder = torch.nn.ModuleDict({"mlp": module(config(hidden_size=HIDDEN, intermediate_size=WIDE))}).to(dtype)
    targets = ["gate_proj", "up_proj", "down_proj"]
    adapter = LoraConfig(r=2, target_modules=targets, lora_dropout=0.2, init_lora_weights=False)
    inject_adapter_in_model(adapter, holder)
    for name, parameter in holder.named_parameters():
        parameter.requires_grad_("lora_" in name)
        parameter.data = parameter.data.to(dtype)
    return holder["mlp"].train()


def passed(module: Any, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Return what a module computes, and every gradient; what is dropped is the same at each call."""
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    with fused_lora(module):
        out = module(leaf)
    out.backward(upstream)
    gradients = [leaf.grad, *(each.grad for each in module.parameters() if each.requires_grad)]
    module.zero_grad(set_to_none=True)
    assert all(each is not None for each in gradients)
    return [out.detach(), *gradients]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(tokens=st.integers(1, 5), size=st.sampled_from([1e-3, 1.0, 30.0]), seed=st.integers(0, 9))
def test_every_number_is_that_of_the_written_out_one(
    kind: str, dtype: torch.dtype, tokens: int, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    module = mlp(kind, dtype)
    x, upstream = (torch.randn(1, tokens, HIDDEN, dtype=dtype) * size for _ in range(2))
    expected = passed(module, x, upstream)
    assert fusable_mlps(module) == [module]
    with fused_mlps([module]):
        found = passed(module, x, upstream)
    assert all(map(torch.equal, found, expected))
    assert "forward" not in vars(module)


def kept(module: Any, fused: bool) -> int:
    """Return the bytes alive between the two passes."""
    torch.manual_seed(1)
    with fused_lora(module), fused_mlps([module] if fused else []), LiveBytes(list(module.parameters())) as live:
        out = module(torch.randn(1, 5, HIDDEN))
    assert out.requires_grad
    return live.now


def test_two_tensors_of_the_inner_width_less_are_kept() -> None:
    module = mlp()
    assert kept(module, fused=False) - kept(module, fused=True) == 2 * 5 * WIDE * torch.float32.itemsize


def test_a_pass_without_gradient_is_the_same() -> None:
    module = mlp().eval()
    x = torch.randn(1, 5, HIDDEN)
    with torch.no_grad():
        expected = module(x)
        with fused_mlps([module]):
            assert torch.equal(module(x), expected)


def test_what_is_kept_elsewhere_is_fetched_from_there() -> None:
    """TRL moves what the backward pass needs to another device, by hooks of its own."""
    module = mlp()
    x, upstream = (torch.randn(1, 5, HIDDEN) for _ in range(2))
    expected = passed(module, x, upstream)
    moved = []

    def away(kept: torch.Tensor) -> int:
        moved.append(kept.clone())
        return len(moved) - 1

    with fused_mlps([module]), torch.autograd.graph.saved_tensors_hooks(away, moved.__getitem__):
        found = passed(module, x, upstream)
    assert moved
    assert all(map(torch.equal, found, expected))


def test_autocast_changes_the_numbers_as_it_does_without() -> None:
    module = mlp()
    x, upstream = torch.randn(1, 5, HIDDEN), torch.randn(1, 5, HIDDEN, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = passed(module, x, upstream)
        with fused_mlps([module]):
            found = passed(module, x, upstream)
    assert all(map(torch.equal, found, expected))


class CutOff(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))


class Scaled(LlamaMLP):
    factor = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.factor


class Pair(LlamaMLP):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


class Flat(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _tokens, _width = x.shape
        return super().forward(x)


class Weighed(LlamaMLP):
    def forward(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if weights is None else x * weights)


def trained() -> LlamaMLP:
    module = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=WIDE))
    module.act_fn = torch.nn.PReLU()
    return module


def hooked() -> LlamaMLP:
    """As accelerate leaves a module that it moves about."""
    module = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=WIDE))
    module.forward = module.forward
    return module


@pytest.mark.parametrize(
    "module",
    [
        *(
            each(LlamaConfig(hidden_size=HIDDEN, intermediate_size=WIDE))
            for each in (CutOff, Scaled, Pair, Flat, Weighed)
        ),
        GPTNeoXMLP(GPTNeoXConfig(hidden_size=HIDDEN, num_attention_heads=4, intermediate_size=WIDE)),
        trained(),
        hooked(),
    ],
    ids=[
        "cut off",
        "scaled",
        "a pair",
        "other shapes",
        "another argument",
        "no gate",
        "trained activation",
        "forward replaced",
    ],
)
def test_what_computes_something_else_is_left_alone(module: torch.nn.Module) -> None:
    assert fusable_mlps(module) == []
