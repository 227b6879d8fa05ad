"""A TRL trainer whose model is computed in packed micro-batches. Read in trl 1.16.0 and transformers 5.23.

TRL computes the loss and its metrics from per-token fields [N, L - 1]. They are put together here from micro-batches
of real tokens; TRL's loss then gives the gradient of each log-probability, which goes back through its micro-batch. So
the loss, its scaling over gradient accumulation and every logged number are TRL's own, for each batch as the config
cuts it, and the micro-batches cut across those batches as the memory likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from lora_exp.engine.dropout import drops
from lora_exp.engine.forward import PackedForward, PerToken, places, unpad
from lora_exp.engine.packing import Family, PackedRow, families, microbatches, pack

Batch = dict[str, Any]


class PackedTraining:
    """Mixed in before a TRL trainer that has `scored_labels(inputs)`.

    Attributes:
        packed_forward: Scores a flat row.
        tokens_per_microbatch: Tokens of a flat row; a longer example has one to itself.
        shares: Whether examples share what they have in common from their start, told whether some of it is dropped.
        rows_per_example: Rows of a padded batch that an example makes.
        whole_batches: Whether the loss compares the examples of a batch, so that one micro-batch must hold it whole.
    """

    packed_forward: PackedForward
    tokens_per_microbatch: int
    shares: Callable[[bool], bool]
    rows_per_example: int
    whole_batches: bool

    _total_train_tokens: int
    _waiting: tuple[Batch, ...] = ()
    """The batches of an optimiser step that came so far."""
    _output: FusedCausalLMOutput | None = None
    """What the model is said to have answered, while a loss is taken."""

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Wait for the last batch of an optimiser step, then compute them all; return the sum of their losses."""
        self._waiting = (*self._waiting, self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        if len(self._waiting) < self.current_gradient_accumulation_steps:  # type: ignore[attr-defined]
            return torch.zeros((), device=self.args.device)  # type: ignore[attr-defined]
        batches, self._waiting = self._waiting, ()
        model.train()
        with self.maybe_activation_offload_context:  # type: ignore[attr-defined]
            return self._packed_step(model, batches, num_items_in_batch)

    def _packed_step(self, model: Any, batches: tuple[Batch, ...], num_items_in_batch: Any) -> torch.Tensor:
        plan = Plan.of(self, batches)
        total = torch.zeros((), device=self.args.device)  # type: ignore[attr-defined]
        for row, touched in plan:
            with self.accelerator.autocast():  # type: ignore[attr-defined]
                scores = self.packed_forward.scores(row)
            slope = torch.zeros_like(scores.log_probs)
            for number in touched:
                at, columns, sources = places(row, plan.rows_of[number], slope.device)
                plan.fields[number].place(scores, at, columns, sources)
                self._output = plan.fields[number].output()
                complete = plan.complete(number, row)
                with self._logged(complete):
                    loss = super().training_step(model, batches[number], num_items_in_batch)  # type: ignore[misc]
                gradient = self._output.log_probs.grad
                if gradient is not None:
                    slope.index_add_(0, sources, gradient[at, columns])
                self._output = None
                if complete:
                    total += loss
            if scores.log_probs.requires_grad:
                scores.log_probs.backward(slope)
        return total

    def compute_loss(
        self,
        model: Any,  # noqa: ARG002
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Take TRL's loss of fields that were computed packed."""
        output = self._output or self._evaluated(inputs)
        return super().compute_loss(  # type: ignore[misc]
            lambda **_: output, inputs, return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _evaluated(self, inputs: Batch) -> FusedCausalLMOutput:
        plan = Plan.of(self, (inputs,))
        for row, _ in plan:
            with self.accelerator.autocast():  # type: ignore[attr-defined]
                scores = self.packed_forward.scores(row)
            plan.fields[0].place(scores, *places(row, plan.rows_of[0], scores.log_probs.device))
        return plan.fields[0].output()

    @contextmanager
    def _logged(self, wanted: bool) -> Iterator[None]:
        """Let TRL note its metrics, or forget them: a batch that several micro-batches share is logged once."""
        if wanted:
            yield
            return
        mode = "train" if self.model.training else "eval"  # type: ignore[attr-defined]
        kept = {name: list(values) for name, values in self._metrics[mode].items()}  # type: ignore[attr-defined]
        tokens = self._total_train_tokens
        yield
        self._metrics[mode].clear()  # type: ignore[attr-defined]
        self._metrics[mode].update(kept)  # type: ignore[attr-defined]
        self._total_train_tokens = tokens


class Plan:
    """The micro-batches of some batches.

    Iterating gives each flat row with the numbers of the batches that have examples in it.
    """

    def __init__(
        self, batches: list[list[Family]], labels: list[torch.Tensor], budget: int, whole: bool, across: bool
    ) -> None:
        units = batches if whole else [[family] for batch in batches for family in batch]
        self.flat = [
            pack([family for index in members for family in units[index]], across)
            for members in microbatches(units, budget, across)
        ]
        self.fields = [PerToken(each) for each in labels]
        self.rows_of, first = [], 0
        for each in labels:
            self.rows_of.append(range(first, first + len(each)))
            first += len(each)
        self._last = {}
        for row in self.flat:
            for number in self._touched(row):
                self._last[number] = row

    @classmethod
    def of(cls, trainer: Any, batches: tuple[Batch, ...]) -> Plan:
        """Plan the batches as the trainer's collator made them."""
        cut, labels, first = [], [], 0
        for batch in batches:
            marks = trainer.scored_labels(batch)
            rows = unpad(batch["input_ids"], batch["attention_mask"], marks, first)
            cut.append(families(rows, trainer.rows_per_example))
            labels.append(marks)
            first += len(rows)
        across = trainer.shares(drops(trainer.model))
        return cls(cut, labels, trainer.tokens_per_microbatch, trainer.whole_batches, across)

    def __iter__(self) -> Iterator[tuple[PackedRow, list[int]]]:
        return ((row, self._touched(row)) for row in self.flat)

    def complete(self, number: int, row: PackedRow) -> bool:
        """Whether this is the last flat row with examples of the batch."""
        return self._last[number] is row

    def _touched(self, row: PackedRow) -> list[int]:
        return [number for number, rows in enumerate(self.rows_of) if not row.places.keys().isdisjoint(rows)]


def packed_trainer(trainer: type[Any]) -> type[Any]:
    """Return a trainer class that computes packed."""
    return type(f"Packed{trainer.__name__}", (PackedTraining, trainer), {})
