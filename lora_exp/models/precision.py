"""Which number format to train in, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lora_exp.config import TrainerConfig
from lora_exp.errors import Problem, UserError

DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Precision:
    """The dtype of the base weights and of autocast, and the reason for it."""

    dtype: DtypeName
    reason: str

    @property
    def bf16(self) -> bool:
        """Whether `TrainingArguments.bf16` is on."""
        return self.dtype == "bfloat16"

    @property
    def fp16(self) -> bool:
        """Whether `TrainingArguments.fp16` is on."""
        return self.dtype == "float16"


def choose_device(trainer: TrainerConfig) -> Any:
    """Return the torch device that Trainer will use."""
    import torch

    if trainer.use_cpu:
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def choose_precision(trainer: TrainerConfig, device: Any) -> Precision:
    """Return what `trainer.bf16` and `trainer.fp16` come to on this device.

    Raises:
        UserError: If fp16 is asked for where there is no GPU.
    """
    if trainer.fp16:
        if device.type == "cpu":
            problem = Problem("trainer.fp16", "fp16 training needs a GPU, and there is none", "trainer=default")
            raise UserError("this machine cannot train so", [problem])
        return Precision("float16", "trainer.fp16=true")
    if trainer.bf16 != "auto":
        dtype: DtypeName = "bfloat16" if trainer.bf16 else "float32"
        return Precision(dtype, f"trainer.bf16={str(trainer.bf16).lower()}")
    if _computes_bf16(device):
        return Precision("bfloat16", f"this {_kind(device)} computes in bf16")
    return Precision("float32", f"this {_kind(device)} only emulates bf16")


def _kind(device: Any) -> str:
    return "processor" if device.type == "cpu" else "GPU"


def _computes_bf16(device: Any) -> bool:
    """Whether the hardware multiplies bf16 itself (torch also runs it, slower than fp32, where it does not)."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_tile", "bf16"))
    return False
