"""How many bytes of tensors are alive at once, counted on tensors without data.

torch's fake tensors (`torch/_subclasses`, read in torch 2.13) go through every operation with their shapes alone,
forward and backward, so a training step of any model is counted as it is written, in a second and in no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):  # type: ignore[misc]
    """Counts what is alive within the block, beyond what was there before.

    Args:
        before: Tensors that were there before, such as the weights.

    Attributes:
        now: Bytes alive.
        peak: The most of them at any moment so far.
        products: The matrix products that were computed, by shape.
    """

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.products: set[Any] = set()
        self._known = {tensor.untyped_storage()._cdata for tensor in before}
        self._before = before  # a storage's address is its name only while it lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:  # half of what is asked; no tensor comes of it
            return args[0].device
        func, kwargs = QUICKER.get(func, func), kwargs or {}
        # Tensors that numpy made have passed no operation before the one that takes them.
        for each in tree_leaves((args, kwargs)):
            self._note(each)
        if func in PRODUCTS:
            self.products.add((func, *(tuple(each.shape) for each in tree_leaves(args) if hasattr(each, "shape"))))
        assumed = ASSUMED.get(func) if args and isinstance(args[0], FakeTensor) else None
        out = NotImplemented if assumed is None else assumed(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        for each in tree_leaves(out):
            self._note(each)
        return out

    def _note(self, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        name = storage._cdata
        if name in self._known:
            return
        self._known.add(name)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, name, size)

    def _freed(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def _all_places(values: torch.Tensor) -> torch.Tensor:
    return values.new_empty((values.numel(), values.dim()), dtype=torch.int64)


def _all_rows(values: torch.Tensor, indices: list[torch.Tensor | None]) -> Any:
    """Return what a mask of truth values would take out if all were true."""
    first = indices[0]
    if first is None or first.dtype != torch.bool:
        return NotImplemented
    return values.new_empty((first.numel(), *values.shape[first.dim() :]))


def _one(value: torch.Tensor) -> Any:
    return 1.0 if value.is_floating_point() else 1


ASSUMED: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: _all_places,
    aten.index.Tensor: _all_rows,
    aten._local_scalar_dense.default: _one,
    aten.allclose.default: lambda *_, **__: True,
}
"""Operations whose result depends on the data: the most that they can give."""

DEVICE = torch.ops.prim.device.default

QUICKER = {aten._unsafe_view.default: aten.view.default}
"""Operations in whose place another gives a tensor of the same memory; torch remembers its shapes by those it was given
before, and works out those of the first one anew each time."""

PRODUCTS = {
    aten.mm.default,
    aten.mm.out,
    aten.addmm.default,
    aten.addmm_.default,
    aten.bmm.default,
    aten.linear.default,
}
"""Matrix products: a processor compiles one for each shape."""
