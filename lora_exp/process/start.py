"""What a command that trains does first, before torch is imported."""

from __future__ import annotations

import os

from lora_exp.allocator import restart_with_mimalloc

NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""With 1 `torch.cuda.is_available()` asks NVML and leaves CUDA's driver alone, so that a process may fork after it:
a sweep works in a fork. Read in torch 2.13, `torch/cuda/__init__.py`."""


def start_process() -> None:
    """Set the environment that this process and its children need, and start anew with mimalloc if it can be had.

    What the user has set stays.
    """
    os.environ.setdefault(NVML_CHECK, "1")
    restart_with_mimalloc()
