"""What the machine can do at best: the rate of the matrix products that a training step is made of."""

from __future__ import annotations

import time
from statistics import median

import torch

SHAPES = ((576, 576), (576, 1536), (1536, 576))
"""Inputs and outputs of SmolLM2-135M's linear layers."""
ROWS = 2048


def gemm_rate(dtype: torch.dtype, device: torch.device, repeats: int = 15) -> float:
    """Return floating-point operations a second of the model's own products."""
    pairs = [
        (torch.randn(ROWS, i, dtype=dtype, device=device), torch.randn(o, i, dtype=dtype, device=device))
        for i, o in SHAPES
    ]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for x, weight in pairs:
            torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sum(2 * ROWS * i * o for i, o in SHAPES) / median(seconds)


def parameters_multiplied() -> int:
    """Return the weights of SmolLM2-135M that every token is multiplied with, less the output layer's."""
    hidden, inner, key_values, layers = 576, 1536, 192, 30
    return layers * (2 * hidden * hidden + 2 * hidden * key_values + 3 * hidden * inner)


def head_parameters() -> int:
    """Return the output layer's weights, for scored tokens."""
    return 576 * 49152
