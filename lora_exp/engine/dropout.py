"""Dropout on a processor: the places that are dropped are drawn, not a number for each value.

torch 2.13 draws a number for each value, one after the other, on one core: 3.8 ms for 1,600 x 576 of them, several
times the adapter's own products. Between two dropped values lie geometrically many kept ones, so as many numbers as
values are dropped say as much: 0.2 ms at a share of 5 %. The places are also what the backward pass needs, in a tenth
of a mask's memory.
"""

from __future__ import annotations

import math

import numpy as np
import torch

NONE_EXPECTED = 1e-12
"""Expected dropped values below which none is."""


def drops(model: torch.nn.Module) -> bool:
    """Whether a model, in the mode that it is in, drops values."""
    return any(isinstance(each, torch.nn.Dropout) and each.training and each.p > 0 for each in model.modules())


def dropped_places(size: int, share: float) -> torch.Tensor:
    """Return which of `size` values are dropped, each with probability `share` and independently; ascending int64 [K].

    Seeded from torch's generator, so that a run that is resumed with its state draws the same.

    Args:
        size: Number of values.
        share: At least 0 and below 1.
    """
    rate = -math.log1p(-share)
    if size * rate < NONE_EXPECTED:
        return torch.empty(0, dtype=torch.int64)
    random = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
    many = math.ceil(size * share + 6 * math.sqrt(size * share)) + 1  # enough but once in a billion times
    runs = []
    last = -1
    while last < size:
        # The whole part of an exponential number is geometric (Devroye 1986, X.2). A run longer than all is as long.
        kept = np.minimum(random.standard_exponential(many), size * rate) / rate
        run = np.cumsum(kept.astype(np.int64) + 1) + last
        runs.append(run)
        last = int(run[-1])
    places = np.concatenate(runs)
    return torch.from_numpy(places[: np.searchsorted(places, size)])


def zeroed(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return a copy with 0 at some places of the flattened tensor."""
    return values.reshape(-1).index_fill(0, places, 0).view(values.shape)
