"""Two engines side by side: trainers over the same rows, an optimiser step of each, and how far the steps lie apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp.engine.training import PackedTraining
from lora_exp.reports import console
from tests.runs import build_trainer

Batch = dict[str, torch.Tensor]

ENGINES = ("padded", "packed")

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
"""TRL's columns of reference log-probabilities."""

PAIR_AT_A_TIME = 1
"""A budget that no example fits into, so each has a micro-batch to itself."""
SOME_AT_A_TIME = 90
"""A budget of an example or two of `pairs`."""
ALL_AT_ONCE = 100_000

FEW = [
    "tracker=none", "trainer.bf16=false", "data=splits", "data.chat_template=false", "recipe.max_length=256",
    "lora.r=4", "lora.lora_alpha=8", "lora.lora_dropout=0.0", "trainer.warmup_steps=0", "trainer.max_grad_norm=0.0",
]  # fmt: skip
"""A run on few short rows, whose gradients nothing clips."""


@contextmanager
def told() -> Iterator[dict[str, str]]:
    """Collect what runs say in the meantime, by the name it stands beside."""
    lines: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "say", lines.__setitem__)
        yield lines


@dataclass(frozen=True)
class Step:
    """What one optimiser step is made of: the loss, what is logged, and the gradient of every trained parameter."""

    loss: float
    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]

    @cached_property
    def gradient(self) -> torch.Tensor:
        return flat(self.gradients)


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return how far two vectors lie apart, as a share of the second's size; of nothing at all, what there is."""
    return float((first - second).norm() / (second.norm() or 1.0))


def adapter(trainer: Any) -> torch.Tensor:
    """Return every number that is trained."""
    return flat({name: each.detach() for name, each in trainer.model.named_parameters() if each.requires_grad})


def disturb(trainer: Any, size: float = 0.05) -> None:
    """Make adapters do something: theirs start at zero, where half of the gradients are zero too."""
    trainer.starts_alike = False
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.data.copy_(size * noise)


def batches(trainer: Any, number: int = 2, size: int = 4) -> list[Batch]:
    """Collate the first rows."""
    rows = [{k: v for k, v in row.items() if k != "row"} for row in trainer.train_dataset]
    return [trainer.data_collator(rows[first : first + size]) for first in range(0, number * size, size)]


def step(trainer: Any, given: Sequence[Batch]) -> Step:
    """Compute the gradients of one optimiser step that accumulates these batches, as `Trainer.train` goes about it."""
    trainer.model.zero_grad(set_to_none=True)
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    # TRL's loss of SFT writes into its batch.
    samples, items = trainer.get_batch_samples(iter([dict(each) for each in given]), len(given), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(samples)
    loss = sum(float(trainer.training_step(trainer.model, each, items)) for each in samples)
    metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    gradients = {
        name: torch.zeros_like(each) if each.grad is None else each.grad.clone()
        for name, each in trainer.model.named_parameters()
        if each.requires_grad
    }
    return Step(loss, metrics, gradients)


@dataclass(frozen=True)
class Engines:
    """The same run by both engines: the same base, the same adapter, the same rows."""

    padded: Any
    packed: Any

    def to(self, dtype: torch.dtype) -> Engines:
        """Compute in another number format. From float32 to float64 and back nothing is lost."""
        for each in (self.padded, self.packed):
            each.model.to(dtype)
        return self

    def share_reference(self) -> None:
        """Give the padded trainer the columns that the packed one read from the store."""
        for split, name in itertools.product(("train_dataset", "eval_dataset"), REFERENCE):
            column = list(getattr(self.packed, split)[name])
            setattr(self.padded, split, getattr(self.padded, split).add_column(name, column))
        self.padded.precompute_ref_logps = True

    def forget_reference(self) -> None:
        """Let both compute it in each step."""
        self.packed.precompute_ref_logps = False

    def padded_step(self) -> Step:
        return step(self.padded, batches(self.packed))

    def packed_step(self, budget: int) -> Step:
        """Return the step in micro-batches of `budget` tokens."""
        self.packed.tokens_per_microbatch = budget
        return step(self.packed, batches(self.packed))


def build_engines(folder: Path, overrides: Sequence[str], disturbed: bool = True) -> Engines:
    """Build both, through the corridor; their adapters are the same and, if `disturbed`, do something."""
    both = {}
    for engine in ENGINES:
        trainer = build_trainer(folder / engine, [*FEW, f"engine={engine}", *overrides])
        assert isinstance(trainer, PackedTraining) == (engine == "packed")
        if disturbed:
            disturb(trainer)
        both[engine] = trainer
    padded, packed = both["padded"], both["packed"]
    for (name, first), (other, second) in zip(
        padded.model.named_parameters(), packed.model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(first, second)
    return Engines(padded, packed)
