"""The same attention as `attention.py`, as one FlexAttention kernel on CUDA.

FlexAttention (torch) computes only those blocks of 128 x 128 scores in which some query sees some key, with a mask
that is a function of the two places. transformers compiles and calls it (`flex_attention_forward`, read in 5.23).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_exp.engine.packing import Family

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SHARED = -1
"""The branch of a family's prefix."""


@dataclass(frozen=True)
class Places:
    """Where each of a flat row's T tokens stands; each field [T].

    Args:
        family: The number of its family.
        branch: The number of its row within the family; `SHARED` in the prefix.
        position: Its place in its row.
    """

    family: torch.Tensor
    branch: torch.Tensor
    position: torch.Tensor

    @classmethod
    def of(cls, families: Sequence[Family], device: torch.device) -> Places:
        """Return the places of a flat row's tokens."""
        parts: list[tuple[int, int, int, int]] = []  # family, branch, first position, tokens
        for number, family in enumerate(families):
            parts.append((number, SHARED, 0, family.prefix))
            parts += [(number, branch, family.prefix, size) for branch, size in enumerate(family.branches)]
        sizes = [size for *_, size in parts]
        family_of, branch_of = (np.repeat([part[column] for part in parts], sizes) for column in (0, 1))
        position = np.concatenate([np.arange(first, first + size) for _, _, first, size in parts])
        fields = (torch.from_numpy(each).to(device) for each in (family_of, branch_of, position))
        return cls(*fields)

    def mask(self, window: int | None) -> Any:
        """Return FlexAttention's `mask_mod`: whether the token at `query` sees the one at `key`.

        Args:
            window: A token sees this many tokens back, itself included; None: all.
        """
        family, branch, position = self.family, self.branch, self.position

        def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            distance = position[query] - position[key]
            own = (family[query] == family[key]) & ((branch[key] == SHARED) | (branch[key] == branch[query]))
            seen = own & (distance >= 0)
            return seen if window is None else seen & (distance < window)

        return sees


def suits(query: torch.Tensor) -> bool:
    """Whether the kernel computes queries like these: half precision on CUDA, where Triton is there to compile it.

    In float32 its products would be of fewer bits than a matrix product's, and float64 it does not know.
    """
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    from torch.utils._triton import has_triton

    return bool(has_triton())


def block_mask(places: Places, window: int | None) -> BlockMask:
    """Return the mask of a flat row. On CUDA it is compiled, so that [T, T] is never held."""
    from torch.nn.attention.flex_attention import create_block_mask

    total, device = len(places.family), places.family.device
    on_cuda = device.type == "cuda"
    return create_block_mask(places.mask(window), None, None, total, total, device=str(device), _compile=on_cuda)
