"""One cell of the table: what is trained, and how."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
BATCH = 8
FILES = {"sft": "train.jsonl", "dpo": "train.dpo.jsonl"}


@dataclass(frozen=True)
class Case:
    """What a worker trains.

    Args:
        recipe: `sft` or `dpo`.
        quant: `none`, `8bit` or `4bit`.
        dtype: `bfloat16` or `float32`.
        rows: A folder as `data=splits` reads it.
        max_length: Tokens of a row at most.
        reference: `each step` or `precomputed`; TRL's choice, ours is always kept.
        steps: Optimiser steps that are timed, after one that is not.
        beta: DPO's; None: the default of both sides, 0.1.
    """

    recipe: str
    quant: str
    dtype: str
    rows: Path
    max_length: int = 512
    reference: str = "each step"
    steps: int = 3
    beta: float | None = None

    def overrides(self, folder: Path) -> list[str]:
        """Return the case as this project's overrides."""
        return [
            f"recipe={self.recipe}",
            f"quant={self.quant}",
            "model=smollm2_135m",
            "data=splits",
            f"data.train_file={self.rows / FILES[self.recipe]}",
            "data.splits_dir=null",
            "tracker=none",
            "trainer.eval_strategy=no",
            f"trainer.bf16={str(self.dtype == 'bfloat16').lower()}",
            f"trainer.max_steps={self.steps + 1}",
            f"trainer.per_device_train_batch_size={BATCH}",
            f"recipe.max_length={self.max_length}",
            "samples.num_prompts=0",
            f"output_dir={folder}",
            *([] if self.beta is None else [f"recipe.beta={self.beta}"]),
        ]

    def arguments(self) -> list[str]:
        """Return the case as a worker's command line."""
        given = [(name, value) for name, value in asdict(self).items() if value is not None]
        return [part for name, value in given for part in (f"--{name}", str(value))]


def parse() -> Case:
    """Read a worker's command line."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    types: dict[str, type] = {"Path": Path, "int": int, "float | None": float}
    for name, field in Case.__dataclass_fields__.items():
        parser.add_argument(f"--{name}", type=types.get(str(field.type), str))
    return Case(**vars(parser.parse_args()))
