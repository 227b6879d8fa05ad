"""What a run holds in memory: from the model's structure, the rows' lengths and the code that will compute them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_exp.allocator import allocator_name
from lora_exp.config import Config
from lora_exp.data.lengths import RowLengths
from lora_exp.machine import KERNELS
from lora_exp.models.policy import writes_into_base
from lora_exp.models.precision import choose_precision
from lora_exp.models.targets import linear_layers
from lora_exp.preflight.activations import Passes
from lora_exp.preflight.batches import Examples, Largest, Order, largest_flat, largest_padded
from lora_exp.preflight.estimate import Estimate, Item
from lora_exp.preflight.lengths import shorten
from lora_exp.preflight.model_passes import ModelPasses
from lora_exp.preflight.schedule import schedule
from lora_exp.recipes.divergence import ROWS as DIVERGENCE_ROWS


@dataclass(frozen=True)
class Keeping:
    """What an allocator keeps beyond what is asked of it; fitted to the runs of benchmarks/MEMORY.md.

    Args:
        kernel: Bytes of one compiled product in half precision on a processor (`machine.bound_kernel_caches`).
        packed: Share of what comes and goes in a step of the packed engine that is held once more: blocks of a batch
            of another length do not fit into the places of those before.
        padded: The same of the padded engine.
        fresh: Share of an evaluation's memory that is not found among what training has freed: its blocks are larger.
    """

    kernel: int
    packed: float
    padded: float
    fresh: float = 0.6


KEEPING = {
    "mimalloc": Keeping(kernel=300 * 2**10, packed=0.1, padded=0.15),
    "system": Keeping(kernel=900 * 2**10, packed=0.25, padded=0.65),
}
"""By allocator (`lora_exp/allocator.py`)."""

STATES = {"adamw": 2, "adam": 2, "adafactor": 0, "sgd": 0, "rmsprop": 1, "lion": 1, "adagrad": 1}
"""Numbers that an optimiser keeps for each trained one, by the beginning of `trainer.optim`."""

REFERENCE_ROWS = 64
"""Rows that are drawn together to find a full micro-batch of the reference."""


MORE = 2
"""Times as many tokens as in training make a forward pass alone worth counting: it holds less than half of what a
backward pass needs of each token."""


@dataclass(frozen=True)
class Rows:
    """Lengths of the rows after they were cut.

    Args:
        train: Prompt and answers of each [rows, 1 + answers].
        val: The same of the validation rows; None where there are none.
        steps: Optimiser steps of the run.
    """

    train: Examples
    val: Examples | None
    steps: int


@dataclass(frozen=True)
class Way:
    """How a run is computed.

    Args:
        engine: `packed` or `padded`.
        tokens: Of a micro-batch of the packed engine; None for the padded one.
        checkpointing: Whether activations are recomputed.
    """

    engine: str
    tokens: int | None
    checkpointing: bool


@dataclass(frozen=True)
class Place:
    """Where a run trains.

    Args:
        device: The torch device.
        process: Bytes that the process takes before weights are loaded; 0 on a GPU.
        room: Bytes that the run may fill in all.
        free: Bytes of them that nobody fills yet.
    """

    device: Any
    process: int
    room: int
    free: int


def rows_of(config: Config, lengths: Mapping[str, RowLengths]) -> Rows:
    """Return the lengths of the rows as a run cuts them."""
    limits = config.recipe.limits
    examples = {split: shorten(each, limits[split]).examples() for split, each in lengths.items()}
    val = examples.get("val")
    val = val if val is not None and len(val) else None
    return Rows(examples["train"], val, schedule(config.trainer, len(examples["train"]), val is not None).steps)


class Memory:
    """The memory of one run, for any way of computing it.

    Args:
        config: The run.
        structure: The model's, from `read_structure`.
        start: The folder of the adapter to go on from, if any.
        place: Where it trains.
        lengths: Of its rows before anything is cut, by split.
    """

    def __init__(
        self, config: Config, structure: Any, start: Path | None, place: Place, lengths: Mapping[str, RowLengths]
    ) -> None:
        self.config, self._structure, self.start, self.place, self.lengths = config, structure, start, place, lengths
        self.device, self.room = place.device, place.room
        self.precision = choose_precision(config.trainer, place.device)
        self.rows = rows_of(config, lengths)
        self._model = ModelPasses(config, structure, start, self.precision)
        self._made: dict[Way, Estimate] = {}

    def of(self, config: Config) -> Memory:
        """Return the memory of the same rows with the same model under another config."""
        return Memory(config, self._structure, self.start, self.place, self.lengths)

    def need(self, engine: str, tokens: int | None, checkpointing: bool) -> int:
        """Return the bytes that the run fills, computed in this way."""
        return self.estimate(Way(engine, tokens, checkpointing)).total

    def estimate(self, way: Way) -> Estimate:
        """Return what the run needs when it is computed in this way."""
        if way not in self._made:
            self._made[way] = self._estimate(way)
        return self._made[way]

    def require(self, engine: str, tokens: int | None, checkpointing: bool) -> None:
        """Check that the run fits, computed in this way.

        Raises:
            UserError: If it cannot, with the changes that would make it fit.
        """
        from lora_exp.preflight.fit import require_fit

        require_fit(self, Way(engine, tokens, checkpointing))

    def _estimate(self, way: Way) -> Estimate:
        batch = self._largest("training", way.tokens)
        passes = self._model.passes(batch, True, way.checkpointing)
        widened = self._model.whole.widest_quantised * self.precision_bytes
        lasting, passing = self._lasting(passes, way), self._passing(passes, way, widened)
        before = sum(item.size for item in lasting) + widened
        stages = {name: before + size for name, size in self._forward_stages(batch, way).items()}
        if "evaluation" in stages and self.device.type == "cpu":
            fresh = KEEPING[allocator_name()].fresh * (stages["evaluation"] - before)
            stages["evaluation"] = max(
                stages["evaluation"], sum(item.size for item in [*lasting, *passing]) + int(fresh)
            )
        stages["loading"] = self.place.process + self._loading
        return Estimate(tuple(item for item in [*lasting, *passing] if item.size), stages)

    def _lasting(self, passes: Passes, way: Way) -> list[Item]:
        """Return what is held through the whole run."""
        trained = self.trained_bytes
        whole, optim = self._model.whole, self.config.trainer.optim
        return [
            Item("process", self.place.process, "Python and the libraries"),
            Item("base", whole.base_bytes, self._base_text()),
            Item("adapter", trained * (1 + self._copies), f"{self.trained:,} parameters"),
            Item("optimiser", int(trained * states_of(optim)), optim),
            Item("compiled products", self._kernels(passes, way), "of half precision, for the shapes that occur"),
        ]

    def _passing(self, passes: Passes, way: Way, widened: int) -> list[Item]:
        """Return what comes and goes in a step."""
        items = [
            Item("activations", passes.kept, passes.doubt or self._way_text(way)),
            Item("output layer", passes.peak - passes.kept + widened, "and what else lives for a moment"),
        ]
        if self.device.type == "cpu":
            share = getattr(KEEPING[allocator_name()], way.engine)
            items.append(Item("heap", int(share * sum(each.size for each in items)), "freed, and not to be used again"))
        return [Item("gradients", self.trained_bytes), *items]

    def _largest(self, stage: str, tokens: int | None) -> Largest:
        """Return the largest batch that a stage computes at once, in micro-batches of `tokens` or whole."""
        trainer = self.config.trainer
        split, rows, order = "train", self.rows.train, Order(REFERENCE_ROWS, 1, shuffled=True)
        if stage == "training":
            batches, whole = trainer.gradient_accumulation_steps, self.config.recipe.compares_examples
            order = Order(trainer.per_device_train_batch_size, batches, True, whole)
        elif stage == "evaluation":
            assert self.rows.val is not None
            split, rows = "val", self.rows.val
            order = Order(trainer.per_device_eval_batch_size, 1, shuffled=False)
        if tokens is not None:
            drops = stage == "training" and self._model.whole.drops
            common = self.lengths[split].common if self.config.engine.shares(drops) else 0
            return Largest(flat=largest_flat(rows, order, tokens, common), common=common)
        return Largest(padded=largest_padded(rows, order))

    def _forward_stages(self, trained: Largest, way: Way) -> dict[str, int]:
        """Return what the stages without a backward pass hold for a moment, where it may be more than training does."""
        recipe, val = self.config.recipe, self.rows.val
        names = ["reference"] if recipe.needs_reference and way.tokens is not None else []
        names += ["evaluation"] if val is not None else []
        batches = {name: self._largest(name, way.tokens) for name in names}
        stages = {
            name: self._model.passes(batch, False, way.checkpointing).peak
            for name, batch in batches.items()
            if batch.tokens > MORE * trained.tokens
        }
        if val is not None and recipe.needs_reference:
            first = val[:DIVERGENCE_ROWS]
            prompt, answer, *_ = first[first[:, 1].argmax()].tolist()
            divergence = self._model.divergence(prompt, answer).peak
            stages["evaluation"] = max(stages.get("evaluation", 0), divergence)
        return stages

    @property
    def base(self) -> Any:
        """The base's structure, with adapter layers and without weights."""
        return self._model.whole.base

    def tokens_at_once(self, tokens: int | None) -> int:
        """Return the tokens of the largest batch that training computes at once.

        Args:
            tokens: Of a micro-batch; None for whole batches.
        """
        return self._largest("training", tokens).tokens

    def products(self) -> tuple[tuple[int, int], int]:
        """Return inputs and outputs of the largest layer, and with how many weights a token is multiplied.

        The output layer counts with the share of the tokens that are scored.
        """
        layers = [self.base.get_submodule(name) for name in linear_layers(self.base) if "lora_" not in name]
        sizes = [(int(each.weight.shape[-1]), int(each.weight.shape[0])) for each in layers]
        head = math.prod(getattr(self.base.get_output_embeddings(), "weight", torch.empty(0)).shape)
        scored = self.rows.train[:, 1:].sum() / self.rows.train.sum()
        return max(sizes, key=math.prod), round(sum(map(math.prod, sizes)) + head * scored)

    @property
    def _loading(self) -> int:
        """The base, and beside it the file it is read from, where it is not used as it lies there."""
        stored = int((self._structure.dtype or torch.float32).itemsize) * self._model.whole.base_parameters
        base = self._model.whole.base_bytes
        if self.device.type != "cpu" or (self.config.quant.target is None and stored == base):
            return base
        return base + stored

    @property
    def trained(self) -> int:
        """Numbers that training moves."""
        return sum(each.numel() for each in self._model.whole.trainable())

    @property
    def trained_bytes(self) -> int:
        """Their bytes."""
        return sum(each.nbytes for each in self._model.whole.trainable())

    @property
    def precision_bytes(self) -> int:
        """Bytes of a number in which is computed."""
        return int(getattr(torch, self.precision.dtype).itemsize)

    @property
    def _copies(self) -> int:
        """Frozen copies of the adapter: the reference, where it is not the base alone."""
        starts_elsewhere = self.start is not None or writes_into_base(self.config.lora)
        return int(self.config.recipe.needs_reference and starts_elsewhere)

    def _kernels(self, passes: Passes, way: Way) -> int:
        """Return the bytes of compiled products: each micro-batch has its own shapes."""
        if self.device.type != "cpu" or self.precision.dtype == "float32":
            return 0
        trainer = self.config.trainer
        summed, steps = trainer.gradient_accumulation_steps, self.rows.steps
        if way.tokens is None:
            batches = summed * steps
        else:
            sizes = self.rows.train.sum(axis=1)
            step = float(sizes.mean()) * trainer.per_device_train_batch_size * summed
            batches = math.ceil(step / way.tokens) * steps
            batches += math.ceil(sizes.sum() / way.tokens) if self.config.recipe.needs_reference else 0
        if self.rows.val is not None:
            batches += math.ceil(len(self.rows.val) / trainer.per_device_eval_batch_size)
            batches += DIVERGENCE_ROWS if self.config.recipe.needs_reference else 0
        return int(min(KERNELS, passes.products * batches)) * KEEPING[allocator_name()].kernel

    def _base_text(self) -> str:
        whole = self._model.whole
        kind = f"in {whole.bits} bits" if whole.bits else str(whole.base.dtype).removeprefix("torch.")
        return f"{whole.base_parameters:,} parameters, {kind}"

    def _way_text(self, way: Way) -> str:
        kept = "recomputed" if way.checkpointing else "kept"
        if way.tokens is not None:
            return f"{kept}, up to {way.tokens:,} tokens at a time"
        rows, columns = self._largest("training", way.tokens).padded
        return f"{kept}, up to {rows} rows of {columns:,} tokens at a time"


def states_of(optim: str) -> float:
    """Return how many numbers an optimiser keeps for each trained one; an unknown one as many as AdamW."""
    size = 0.25 if "8bit" in optim else 1.0
    return size * next((number for name, number in STATES.items() if optim.startswith(name)), 2)
