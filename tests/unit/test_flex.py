"""The kernel's mask means what the blocks compute; run uncompiled, FlexAttention gives the same attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.engine import flex
from lora_exp.engine.attention import Layout, packed_attention
from lora_exp.engine.packing import Family
from tests.unit.test_attention import HEADS, KEY_HEADS, WIDTH, groups


@settings(deadline=None, max_examples=60)
@given(members=groups(), window=st.none() | st.integers(1, 12))
def test_the_mask_lets_through_what_the_blocks_compute(members: list[Family], window: int | None) -> None:
    total = sum(map(len, members))
    device = torch.device("cpu")
    place = torch.arange(total)
    sees = flex.Places.of(members, device).mask(window)(None, None, place[:, None], place[None])
    computed = torch.zeros(total, total, dtype=torch.bool)
    for block in Layout(members, device).blocks(window):
        shape = (*block.queries.shape, block.keys.shape[1])
        seen = (block.mask[:, 0] == 0) & torch.isin(torch.arange(shape[0] * shape[1]), block.real).view(*shape[:2], 1)
        queries, keys = block.queries[:, :, None].expand(shape), block.keys[:, None].expand(shape)
        computed[queries[seen], keys[seen]] = True
    assert torch.equal(sees, computed)


@pytest.mark.parametrize("window", [None, 7])
@settings(deadline=None, max_examples=10)
@given(members=groups())
def test_both_ways_agree(window: int | None, members: list[Family]) -> None:
    total = sum(map(len, members))
    torch.manual_seed(total)
    q, k, v = (torch.randn(1, heads, total, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))

    def attend() -> torch.Tensor:
        layout = Layout(members, torch.device("cpu"))
        return packed_attention(torch.nn.Module(), q, k, v, None, layout=layout, sliding_window=window)[0]

    blocks = attend()
    # Uncompiled, the kernel's forward pass is plain torch operations and runs on any device; its backward needs CUDA.
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(flex, "suits", lambda _: True)
        kernel = attend()
    torch.testing.assert_close(kernel, blocks, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the compiled kernel needs CUDA")
def test_the_compiled_kernel_agrees_on_cuda() -> None:
    import numpy as np

    from lora_exp.engine.packing import Row

    random = np.random.default_rng(0)
    members = [
        Family(
            tuple(
                Row(n, ids, ids) for n in range(2) for ids in [np.r_[np.zeros(shared, int), random.integers(1, 9, own)]]
            )
        )
        for shared, own in ((40, 30), (200, 150), (0, 90))
    ]
    total = sum(map(len, members))
    shapes = [(1, heads, total, 64) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    wide = [torch.randn(shape, device="cuda", dtype=torch.float64, requires_grad=True) for shape in shapes]
    layout = Layout(members, torch.device("cuda"))

    def attend(dtype: torch.dtype) -> list[torch.Tensor]:
        out = packed_attention(torch.nn.Module(), *(each.to(dtype) for each in wide), None, layout=layout)[0].double()
        return [out.detach(), *torch.autograd.grad(out.square().sum(), wide)]

    for found, expected in zip(attend(torch.bfloat16), attend(torch.float64), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.02
