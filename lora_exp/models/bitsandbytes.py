"""What this project knows of bitsandbytes' private parts. Read in bitsandbytes 0.50.2, `nn/modules.py`."""

from __future__ import annotations

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
