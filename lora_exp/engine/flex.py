"""The same attention as `attention.py`, as one FlexAttention kernel on CUDA.

FlexAttention (torch) computes only those blocks of 128 x 128 scores in which some query sees some key, with a mask
that is a function of the two places. transformers compiles and calls it (`flex_attention_forward`, read in 5.23).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lora_exp.process.device import computes_bf16

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from lora_exp.engine.layout import Sight


def suits(query: torch.Tensor) -> bool:
    """Whether the kernel computes queries like these: half precision on CUDA, where Triton is there to compile it.

    In float32 it multiplies in fewer bits than a matmul does, and it does not know float64. GPUs before Ampere have no
    kernel, and what torch compiles in its place has no backward pass.
    """
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not computes_bf16(query.device):
        return False
    from torch.utils._triton import has_triton

    return bool(has_triton())


def block_mask(sight: Sight, window: int | None) -> BlockMask:
    """Return the mask of a flat row. On CUDA it is compiled, so that [T, T] is never held.

    Args:
        sight: Which of its tokens see which.
        window: A token sees this many tokens back, itself included; None: all.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    total, device = len(sight.ends), sight.ends.device

    def mask(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return sight.seen(query, key, window)

    return create_block_mask(mask, None, None, total, total, device=str(device), _compile=device.type == "cuda")
