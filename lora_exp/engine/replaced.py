"""Modules that compute by another function for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def replaced(modules: Sequence[torch.nn.Module], forward_of: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """Have each module compute by `forward_of(module)` within the block; backward passes may follow after it."""
    for module in modules:
        module.forward = forward_of(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
