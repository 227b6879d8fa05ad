"""Gated MLPs (arXiv 2002.05202, `SwiGLU` and its like) that keep two tensors for the backward pass instead of four.

transformers writes `down_proj(act_fn(gate_proj(x)) * up_proj(x))` (`LlamaMLP` and some 140 classes like it, read in
transformers 5.23). Autograd then keeps the gate, its activation, `up` and, for the adapter of `down_proj`, the product:
more than half of what a layer keeps. Here it keeps gate and `up`; the other two are computed from them again, by the
same operations, so that every number stays the same to the last bit.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from lora_exp.engine.replaced import replaced

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def fusable_mlps(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules that compute `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, found out on random numbers."""
    return [module for module in model.modules() if _looks_like_one(module) and _is_one(module)]


def _looks_like_one(module: torch.nn.Module) -> bool:
    return (
        {name for name, _ in module.named_children()} == PARTS
        and "forward" not in vars(module)
        and not list(module.act_fn.parameters())
        and len(inspect.signature(module.forward).parameters) == 1
    )


def _is_one(module: Any) -> bool:
    """Whether its class puts the parts together so, tried with parts that cost nothing."""
    parts = SimpleNamespace(
        gate_proj=lambda x: x + 1, up_proj=lambda x: 3 * x, down_proj=lambda x: 0.5 - x, act_fn=module.act_fn
    )
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    sizes = torch.tensor([[0.01], [1.0], [100.0]])  # a class may cut off large ones
    x = torch.randn(1, 3, 64, generator=generator) * sizes
    try:
        found = type(module).forward(parts, x)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # it is made of other parts, or wants more of them
        return False
    gate, up = parts.gate_proj(x), parts.up_proj(x)
    expected = parts.down_proj(_gated(gate, up, module.act_fn))
    alike = isinstance(found, torch.Tensor) and (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return alike and bool(torch.allclose(found, expected, rtol=0, atol=0))


def fused_mlps(modules: Sequence[torch.nn.Module]) -> AbstractContextManager[None]:
    """Have these modules keep less within the block; backward passes may follow after it."""
    return replaced(modules, _forward_of)


def _forward_of(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        product = _GatedActivation.apply(module.gate_proj(x), module.up_proj(x), module.act_fn)
        with _computed_again(product):
            down: torch.Tensor = module.down_proj(product)
            return down

    return forward


def _gated(gate: torch.Tensor, up: torch.Tensor, act: Any) -> torch.Tensor:
    product: torch.Tensor = act(gate) * up
    return product


class _GatedActivation(torch.autograd.Function):  # type: ignore[misc]
    """act(gate) * up, of which the activation is not kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Any) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.again = act, None
        return _gated(gate, up, act)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, up = ctx.saved_tensors
        gate, activated = ctx.again or _activated_again(ctx)
        ctx.again = None
        (slope,) = torch.autograd.grad(activated, gate, grad * up)
        return slope, grad * activated.detach(), None


def _activated_again(node: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gate as a leaf of a graph of its own, and its activation."""
    with torch.enable_grad():
        gate = node.saved_tensors[0].detach().requires_grad_()
        return gate, node.act(gate)


@contextmanager
def _computed_again(product: torch.Tensor) -> Iterator[None]:
    """Have whoever saves `product` for a backward pass within the block compute it again instead.

    What it is computed from is asked of its own node in the graph. bitsandbytes' 8-bit layers hold on to their input
    in another way; then it is still there.
    """
    node: Any = product.grad_fn
    if node is None:
        yield
        return
    place, size, still_there = product.untyped_storage()._cdata, product.numel(), weakref.ref(product)

    def pack(kept: torch.Tensor) -> torch.Tensor | torch.Size:
        whole = kept.untyped_storage()._cdata == place and kept.numel() == size and kept.is_contiguous()
        return kept.shape if whole else kept

    def unpack(kept: torch.Tensor | torch.Size) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        there: torch.Tensor | None = still_there()
        if there is not None:
            return there.detach().view(kept)
        node.again = _activated_again(node)  # its own backward pass comes next
        return (node.again[1].detach() * node.saved_tensors[1]).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
