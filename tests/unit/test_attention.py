"""Packed attention is each row's own causal attention, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.engine import attention
from lora_exp.engine.attention import Layout, packed_attention
from lora_exp.engine.packing import Family, Row

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


@st.composite
def groups(draw: st.DrawFn) -> list[Family]:
    """Draw families of one or two rows: a shared start of 0 to 9 tokens, then 0 to 14 of their own."""
    members = []
    for _ in range(draw(st.integers(1, 3))):
        shared = draw(st.integers(0, 9))
        sizes = draw(st.lists(st.integers(0 if shared else 1, 14), min_size=1, max_size=2))
        rows = []
        for number, size in enumerate(sizes):
            ids = np.array([0] * shared + [number + 1] * size)
            rows.append(Row(number, ids, ids))
        members.append(Family(tuple(rows)))
    return members


def alone(family: Family, start: int, window: int | None, *packed: torch.Tensor) -> torch.Tensor:
    """Compute a family's rows one by one from the packed q, k, v [H, T, D]; return them as they lie packed."""
    prefix = list(range(start, start + family.prefix))
    out, branch = [], start + family.prefix
    for number, size in enumerate(family.branches):
        places = prefix + list(range(branch, branch + size))
        q, k, v = (each[:, places] for each in packed)
        k, v = (each.repeat_interleave(HEADS // KEY_HEADS, 0) for each in (k, v))
        distance = torch.arange(len(places))[:, None] - torch.arange(len(places))[None]
        seen = (distance >= 0) & (distance < (window or len(places)))
        row = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out.append(row if number == 0 else row[:, family.prefix :])
        branch += size
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("dense", [0, 256])
@settings(deadline=None, max_examples=60)
@given(members=groups(), window=st.none() | st.integers(1, 12), data=st.data())
def test_each_row_attends_as_if_it_were_alone(
    dense: int, members: list[Family], window: int | None, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "DENSE", dense)
        patch.setattr(attention, "QUERIES", data.draw(st.integers(1, 9)))
        total = sum(map(len, members))
        torch.manual_seed(total)
        heads = (HEADS, KEY_HEADS, KEY_HEADS)
        packed = [torch.randn(h, total, WIDTH, dtype=torch.float64, requires_grad=True) for h in heads]
        layout = Layout(members, torch.device("cpu"))
        q, k, v = (each[None] for each in packed)
        found = packed_attention(torch.nn.Module(), q, k, v, None, layout=layout, sliding_window=window)[0]
    starts = np.cumsum([0, *map(len, members)])[:-1]
    rows = [alone(family, int(start), window, *packed) for family, start in zip(members, starts, strict=True)]
    expected = torch.cat(rows, dim=1)
    torch.testing.assert_close(found[0].transpose(0, 1), expected)
    upstream = torch.randn_like(expected)
    slopes = torch.autograd.grad(found[0].transpose(0, 1), packed, upstream)
    for slope, wanted in zip(slopes, torch.autograd.grad(expected, packed, upstream), strict=True):
        torch.testing.assert_close(slope, wanted)


@pytest.mark.parametrize("given", [{"softcap": 30.0}, {"s_aux": torch.zeros(HEADS)}, {"dropout": 0.1}])
def test_what_is_not_computed_is_refused(given: dict[str, object]) -> None:
    q = torch.zeros(1, HEADS, 3, WIDTH)
    row = Row(0, np.arange(3), np.arange(3))
    layout = Layout([Family((row,))], torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="its attention uses"):
        packed_attention(torch.nn.Module(), q, q, q, None, layout=layout, **given)  # type: ignore[arg-type]
