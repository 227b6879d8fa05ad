"""What this project knows of bitsandbytes' private parts. Read in bitsandbytes 0.50.2, `nn/modules.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def keep_differentiable(base: Any) -> None:
    """Keep 4-bit layers in the layout that gradients flow through.

    On processors with AVX512-BF16, the first forward pass in eval mode repacks `Linear4bit` weights for a fast
    inference kernel that has no backward, and training does not undo it: after one evaluation, gradients stop at the
    first such layer, with a warning at most (half of the adapters of a Llama got none).
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def computing_as_in_training(base: Any) -> Iterator[None]:
    """Let 8-bit layers compute as they do in training within the block, whatever the model's mode.

    On a processor they multiply with the dequantised weights in training. In eval mode they also quantise their inputs
    (LLM.int8), and take out a column where any token of the batch is large: another function of the same weights, and
    one in which a row's numbers depend on the rows beside it (a tenth of a hidden state's size in SmolLM2).
    """
    layers = _eight_bit_layers(base)
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


@contextmanager
def without_outliers(base: Any) -> Iterator[None]:
    """Let 8-bit layers quantise the input of each token by itself within the block, taking out no columns."""
    layers = _eight_bit_layers(base)
    before = [layer.state.threshold for layer in layers]
    for layer in layers:
        layer.state.threshold = 0.0
    try:
        yield
    finally:
        for layer, threshold in zip(layers, before, strict=True):
            layer.state.threshold = threshold


def _eight_bit_layers(base: Any) -> list[Any]:
    if not getattr(base, "is_loaded_in_8bit", False):
        return []
    return [module for module in base.modules() if hasattr(module, "init_8bit_state")]
