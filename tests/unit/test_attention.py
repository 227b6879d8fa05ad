"""Packed attention is each row's own causal attention, forward and backward."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.engine import layout
from lora_exp.engine.attention import packed_attention
from lora_exp.engine.layout import Layout
from lora_exp.engine.packing import Family, PackedRow, Row, pack

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


@st.composite
def flat_rows(draw: st.DrawFn) -> PackedRow:
    """Draw a flat row of one to six rows of up to 24 tokens, which start alike in many ways: as others, and as whole
    others."""
    rows = [draw(st.lists(st.integers(0, 2), min_size=1, max_size=14))]
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.sampled_from(rows))
        start = start[: draw(st.integers(0, len(start)))]
        rows.append(start + draw(st.lists(st.integers(0, 2), min_size=0 if start else 1, max_size=10)))
    ids = [np.array(row) for row in rows]
    return pack([Family((Row(number, each, each),)) for number, each in enumerate(ids)])


def alone(places: npt.NDArray[np.int64], window: int | None, *packed: torch.Tensor) -> torch.Tensor:
    """Compute a row by itself from the packed q, k, v [H, T, D]."""
    q, k, v = (each[:, torch.from_numpy(places)] for each in packed)
    k, v = (each.repeat_interleave(HEADS // KEY_HEADS, 0) for each in (k, v))
    distance = torch.arange(len(places))[:, None] - torch.arange(len(places))[None]
    seen = (distance >= 0) & (distance < (window or len(places)))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


@pytest.mark.parametrize("dense", [0, 12, 256])
@settings(deadline=None, max_examples=60)
@given(row=flat_rows(), window=st.none() | st.integers(1, 12), data=st.data())
def test_each_row_attends_as_if_it_were_alone(
    dense: int, row: PackedRow, window: int | None, data: st.DataObject
) -> None:
    total = len(row.ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "DENSE", dense)
        patch.setattr(layout, "QUERIES", data.draw(st.integers(1, 9)))
        torch.manual_seed(total)
        heads = (HEADS, KEY_HEADS, KEY_HEADS)
        packed = [torch.randn(h, total, WIDTH, dtype=torch.float64, requires_grad=True) for h in heads]
        q, k, v = (each[None] for each in packed)
        seen = Layout(row.segments, torch.device("cpu"))
        found = packed_attention(torch.nn.Module(), q, k, v, None, layout=seen, sliding_window=window)[0]
    found = found[0].transpose(0, 1)
    upstream = torch.randn_like(found)
    expected, wanted = torch.zeros_like(found), [torch.zeros_like(each) for each in packed]
    known = np.zeros(total, dtype=bool)
    for places in row.places.values():
        out = alone(places, window, *packed)
        expected[:, places] = out.detach()
        # A token that was computed in a row before sends its gradient back once.
        fresh = torch.from_numpy(~known[places])
        known[places] = True
        slopes = torch.autograd.grad(out, packed, upstream[:, places] * fresh[:, None])
        wanted = [total + slope for total, slope in zip(wanted, slopes, strict=True)]
    assert known.all()
    torch.testing.assert_close(found, expected)
    for slope, each in zip(torch.autograd.grad(found, packed, upstream), wanted, strict=True):
        torch.testing.assert_close(slope, each)


@pytest.mark.parametrize("given", [{"softcap": 30.0}, {"s_aux": torch.zeros(HEADS)}, {"dropout": 0.1}])
def test_what_is_not_computed_is_refused(given: dict[str, object]) -> None:
    q = torch.zeros(1, HEADS, 3, WIDTH)
    flat = pack([Family((Row(0, np.arange(3), np.arange(3)),))])
    seen = Layout(flat.segments, torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="its attention uses"):
        packed_attention(torch.nn.Module(), q, q, q, None, layout=seen, **given)  # type: ignore[arg-type]
