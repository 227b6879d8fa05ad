"""Which dtype to train in, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lora_exp.config import TrainerConfig
from lora_exp.errors import Problem, UserError
from lora_exp.process.device import computes_bf16

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
    kind = "CPU" if device.type == "cpu" else "GPU"
    if computes_bf16(device):
        return Precision("bfloat16", f"this {kind} computes in bf16")
    if device.type == "cuda":
        return Precision("float16", "this GPU only emulates bf16")
    return Precision("float32", f"this {kind} only emulates bf16")
