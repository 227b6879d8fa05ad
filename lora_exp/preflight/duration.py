"""How long a run takes: by what this machine measured before, or else by the rate of its matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lora_exp.config import Config
from lora_exp.machine import device_facts
from lora_exp.preflight.calibration import (
    Speed,
    gemm_rate,
    keep_speed,
    kind_of,
    known_speed,
    measured_speed,
    speed_from_gemm,
)
from lora_exp.preflight.memory import Memory, Rows, Way

if TYPE_CHECKING:
    from lora_exp.data.tokenize import TokenizedData
    from lora_exp.engine.base import Engine
    from lora_exp.models.policy import Policy


class Measured(Protocol):
    """What is read of a run that was trained: its rows, its policy and its engine."""

    @property
    def data(self) -> TokenizedData:
        """The token ids."""

    @property
    def policy(self) -> Policy:
        """The model with its adapter."""

    @property
    def engine(self) -> Engine:
        """What computed it."""


@dataclass(frozen=True)
class Duration:
    """Seconds of a run by what is done in them, and where the numbers come from."""

    parts: dict[str, float]
    source: str

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.parts.values())


def duration(config: Config, memory: Memory, way: Way, evaluations: int) -> Duration:
    """Return how long a run takes.

    Args:
        config: The run.
        memory: Of the same run: it knows the model's structure and the rows' lengths.
        way: How it is computed.
        evaluations: How often the validation rows are evaluated.
    """
    facts = device_facts(memory.device)
    known = known_speed(kind_of(config, way.engine, memory.precision.dtype, facts))
    if known is not None:
        speed, source = known, f"earlier runs of this kind on {facts['name']}: {known.train:,.0f} tokens/s in training"
    else:
        speed, source = _from_products(memory, way)
    rows = memory.rows
    evaluated = tokens_of(rows.val) if rows.val is not None else 0
    forward = speed.evaluate or 2 * speed.train
    parts = {"training": trained_tokens(config, rows) / speed.train, "evaluation": evaluations * evaluated / forward}
    if config.recipe.needs_reference and way.tokens is not None:
        parts["reference, where it is not kept yet"] = (tokens_of(rows.train) + evaluated) / forward
    parts["loading and the rest"] = speed.other
    return Duration({name: seconds for name, seconds in parts.items() if seconds}, source)


def keep_measured_speed(
    config: Config, run: Measured, trainer: Any, final: Mapping[str, float], wall_times: Mapping[str, float]
) -> None:
    """Note how fast this machine was, for the estimate of the next run of this kind.

    Args:
        config: The run.
        run: What it was made of.
        trainer: The TRL trainer, after training.
        final: Its final numbers.
        wall_times: Seconds by stage.
    """
    reports = run.data.reports
    tokens = {split: sum(report.prompt_lengths) + sum(report.answer_lengths) for split, report in reports.items()}
    rows = reports["train"].kept
    batch = min(rows, config.trainer.per_device_train_batch_size * config.trainer.gradient_accumulation_steps)
    trained = trainer.state.global_step * batch * tokens["train"] / rows
    speed = measured_speed(final, trainer.state.log_history, wall_times, trained, tokens.get("val", 0))
    if speed is not None:
        kind = kind_of(config, run.engine.name, run.policy.precision.dtype, device_facts(run.policy.device))
        keep_speed(kind, speed)


def trained_tokens(config: Config, rows: Rows) -> float:
    """Return the tokens of all rows that a run trains on, each as often as it does; prompts once an example."""
    trainer = config.trainer
    batch = min(trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps, len(rows.train))
    return rows.steps * batch * tokens_of(rows.train) / len(rows.train)


def tokens_of(examples: Any) -> int:
    """Return the tokens of all examples, prompts once an example."""
    return int(examples.sum())


def _from_products(memory: Memory, way: Way) -> tuple[Speed, str]:
    import torch

    dtype = getattr(torch, memory.precision.dtype)
    shape, multiplied = memory.products()
    rate = gemm_rate(shape, dtype, memory.device)
    source = (
        f"no such run was measured here yet; a guess from {rate / 1e9:,.0f} GFLOP/s of matrix products of "
        f"{shape[0]:,} x {shape[1]:,}"
    )
    return speed_from_gemm(rate, way.engine, multiplied, way.checkpointing), source
