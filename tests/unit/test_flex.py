"""The kernel's mask means what the blocks compute; run uncompiled, FlexAttention gives the same attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.engine import flex
from lora_exp.engine.attention import packed_attention
from lora_exp.engine.layout import Layout, Sight
from lora_exp.engine.packing import Family, PackedRow, Row, pack
from tests.unit.test_attention import HEADS, KEY_HEADS, WIDTH, flat_rows


@settings(deadline=None, max_examples=60)
@given(row=flat_rows(), window=st.none() | st.integers(1, 12))
def test_the_mask_lets_through_what_the_blocks_compute(row: PackedRow, window: int | None) -> None:
    total = len(row.ids)
    device = torch.device("cpu")
    place = torch.arange(total)
    sees = flex.block_mask(Sight.of(row.segments).to(device), window).mask_mod(None, None, place[:, None], place[None])
    computed = torch.zeros(total, total, dtype=torch.bool)
    for block in Layout(row.segments, device).blocks(window):
        shape = (*block.queries.shape, block.keys.shape[1])
        seen = (block.mask[:, 0] == 0) & torch.isin(torch.arange(shape[0] * shape[1]), block.real).view(*shape[:2], 1)
        queries, keys = block.queries[:, :, None].expand(shape), block.keys[:, None].expand(shape)
        computed[queries[seen], keys[seen]] = True
    assert torch.equal(sees, computed)


@pytest.mark.parametrize("window", [None, 7])
@settings(deadline=None, max_examples=10)
@given(row=flat_rows())
def test_both_ways_agree(window: int | None, row: PackedRow) -> None:
    total = len(row.ids)
    torch.manual_seed(total)
    q, k, v = (torch.randn(1, heads, total, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))

    def attend() -> torch.Tensor:
        layout = Layout(row.segments, torch.device("cpu"))
        return packed_attention(torch.nn.Module(), q, k, v, None, layout=layout, sliding_window=window)[0]

    blocks = attend()
    # Uncompiled, the kernel's forward pass is plain torch operations and runs on any device; its backward needs CUDA.
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(flex, "suits", lambda _: True)
        kernel = attend()
    torch.testing.assert_close(kernel, blocks, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the compiled kernel needs CUDA")
def test_the_compiled_kernel_agrees_on_cuda() -> None:
    random = np.random.default_rng(0)
    starts = ((40, 30), (200, 150), (0, 90))
    texts = [np.r_[np.zeros(shared, int), random.integers(1, 9, own)] for shared, own in starts for _ in range(2)]
    row = pack([Family((Row(number, ids, ids),)) for number, ids in enumerate(texts)])
    total = len(row.ids)
    shapes = [(1, heads, total, 64) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    wide = [torch.randn(shape, device="cuda", dtype=torch.float64, requires_grad=True) for shape in shapes]
    layout = Layout(row.segments, torch.device("cuda"))

    def attend(dtype: torch.dtype) -> list[torch.Tensor]:
        out = packed_attention(torch.nn.Module(), *(each.to(dtype) for each in wide), None, layout=layout)[0].double()
        return [out.detach(), *torch.autograd.grad(out.square().sum(), wide)]

    for found, expected in zip(attend(torch.bfloat16), attend(torch.float64), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.02
