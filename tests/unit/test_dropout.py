"""Dropped places are independent and of the wanted share, and an adapter computes with them as with a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.engine.dropout import dropped_places, drops, zeroed
from lora_exp.engine.peft import _AddLora


@given(size=st.integers(1, 2000), share=st.floats(0, 0.99), seed=st.integers(0, 2**31))
def test_places_are_ascending_and_inside_and_follow_the_seed(size: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    places = dropped_places(size, share)
    assert torch.equal(places, places.unique())
    assert len(places) == 0 or (places[0] >= 0 and places[-1] < size)
    torch.manual_seed(seed)
    assert torch.equal(dropped_places(size, share), places)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_each_value_is_dropped_with_the_share_whatever_its_neighbours(share: float) -> None:
    """Ones and pairs of neighbours, within five standard deviations of what independence gives."""
    torch.manual_seed(0)
    size = 400_000
    dropped = torch.zeros(size, dtype=torch.bool)
    dropped[dropped_places(size, share)] = True
    for hits, expected in ((dropped, share), (dropped[1:] & dropped[:-1], share**2), (dropped[:200], share)):
        deviation = (expected * (1 - expected) / len(hits)) ** 0.5
        # A pair shares a value with the next, which makes the variance at most three times as large.
        assert abs(hits.double().mean() - expected) < 5 * 3**0.5 * deviation


@pytest.mark.parametrize(("share", "training", "expected"), [(0.1, True, True), (0.1, False, False), (0, True, False)])
def test_a_model_drops_something_in_training_alone(share: float, training: bool, expected: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.Dropout(share)))
    assert drops(model.train(training)) == expected


def test_no_share_drops_nothing() -> None:
    assert len(dropped_places(10, 0.0)) == 0


def test_an_adapter_with_dropped_inputs_is_autograds() -> None:
    torch.manual_seed(0)
    x, result = (torch.randn(2, 7, width, dtype=torch.float64, requires_grad=True) for width in (6, 5))
    a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 6), (5, 3)))
    places = dropped_places(x.numel(), 0.3)
    found = _AddLora.apply(result.clone(), x, a, b, 1.7, places, None)
    kept = zeroed(torch.ones_like(x), places)
    wanted = result + 1.7 * (x * kept) @ a.mT @ b.mT
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    parts = (result, x, a, b)
    for slope, right in zip(
        torch.autograd.grad(found, parts, upstream), torch.autograd.grad(wanted, parts, upstream), strict=True
    ):
        torch.testing.assert_close(slope, right)
