"""What the passes of a whole model hold, from those of a few of its layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_exp.config import Config
from lora_exp.errors import raised_here
from lora_exp.models.precision import Precision
from lora_exp.models.targets import linear_layers
from lora_exp.preflight.activations import Passes, divergence_passes, packed_passes, padded_passes
from lora_exp.preflight.batches import Largest
from lora_exp.preflight.twin import Twin, build_twin, period, with_layers

REFUSALS = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What models raise that cannot be computed without their data, or packed (`engine/support.py`)."""

SAVED_PER_FEATURE = 2.0
"""Numbers that a backward pass keeps for each input and output feature of a linear layer, where nothing better is
known; measured on Llama models (benchmarks/NOTES.md)."""

_TWINS: dict[str, Twin] = {}
MOST_TWINS = 6
"""A model needs three: whole, and two parts of it."""

_PASSES: dict[tuple[Any, ...], Passes] = {}
MOST_PASSES = 64
"""What was counted in this process: the trials of a sweep mostly have the same shapes."""


class ModelPasses:
    """Counts the passes of one model with one adapter.

    Args:
        config: The run.
        structure: The model's, from `read_structure`.
        start: The folder of the adapter to go on from, if any.
        precision: What it is trained in.
    """

    def __init__(self, config: Config, structure: Any, start: Path | None, precision: Precision) -> None:
        self.config, self.structure, self.start, self.precision = config, structure, start, precision

    @cached_property
    def whole(self) -> Twin:
        """The model with all its layers."""
        return self._twin(self._layers)

    @property
    def _layers(self) -> int:
        return int(self.structure.get_text_config().num_hidden_layers)

    @cached_property
    def parts(self) -> tuple[tuple[int, Twin], ...]:
        """The model with one period of its layers and with two, by their number; alone where it has no more.

        What a pass holds grows by the same for each further period.
        """
        one = period(self.structure)
        if 2 * one >= self._layers:
            return ((self._layers, self.whole),)
        return tuple((size, self._twin(size)) for size in (one, 2 * one))

    def passes(self, batch: Largest, train: bool, checkpointing: bool) -> Passes:
        """Return what is held for a batch.

        Args:
            batch: The batch.
            train: Whether a backward pass follows; without one no layer leaves anything behind.
            checkpointing: Whether layers are computed again in it.
        """

        def count(twin: Twin) -> Passes:
            if batch.flat is not None:
                return packed_passes(twin, self.precision, batch.flat, train, checkpointing, batch.common)
            return padded_passes(twin, self.precision, batch.padded, train, checkpointing)

        saved = batch.tokens if train and not checkpointing else 0
        return self._remembered((batch.key, train, checkpointing), lambda: self._counted(count, train, saved))

    def divergence(self, prompt: int, answer: int) -> Passes:
        """Return what the divergence from the reference holds for a row of these lengths."""

        def count(twin: Twin) -> Passes:
            return divergence_passes(twin, self.precision, prompt, answer)

        return self._remembered(("divergence", prompt, answer), lambda: self._counted(count, train=False, saved=0))

    def _remembered(self, key: tuple[Any, ...], count: Callable[[], Passes]) -> Passes:
        key = (self._shape, *key)
        if key not in _PASSES:
            _keep(_PASSES, MOST_PASSES, key, count())
        return _PASSES[key]

    def _counted(self, count: Callable[[Twin], Passes], train: bool, saved: int) -> Passes:
        """Return what the whole model's passes hold; roughly, and saying so, where it cannot be counted.

        Args:
            count: Counts it on a model.
            train: Whether a backward pass follows.
            saved: Tokens whose activations are kept for it.
        """
        try:
            return self._extended(count) if train else count(self.parts[0][1])
        except REFUSALS as error:
            if raised_here(error) and not isinstance(error, NotImplementedError):  # attention says so what it cannot do
                raise
            return self._roughly(saved, next(iter(str(error).splitlines()), type(error).__name__))

    def _extended(self, count: Callable[[Twin], Passes]) -> Passes:
        (layers, first), *more = [(layers, count(twin)) for layers, twin in self.parts]
        if not more:
            return first
        ((_, second),) = more
        further = self._layers / layers - 1
        return Passes(
            round(first.kept + (second.kept - first.kept) * further),
            round(first.peak + (second.peak - first.peak) * further),
            second.products,
        )

    def _roughly(self, tokens: int, reason: str) -> Passes:
        base = self.whole.base
        layers = [base.get_submodule(name) for name in linear_layers(base) if "lora_" not in name]
        features = sum(sum(layer.weight.shape) for layer in layers)
        kept = int(SAVED_PER_FEATURE * features * base.dtype.itemsize * tokens)
        return Passes(kept, kept, 0, f"a rough guess, as this model cannot be counted: {reason}")

    def _twin(self, layers: int) -> Twin:
        key = f"{self._shape} {layers}"
        if key not in _TWINS:
            twin = build_twin(self.config, with_layers(self.structure, layers), self.precision, self.start)
            if getattr(self.config.recipe, "disable_dropout", False):
                twin.disable_dropout()
            _keep(_TWINS, MOST_TWINS, key, twin)
        return _TWINS[key]

    @cached_property
    def _shape(self) -> str:
        """What two runs have in common whose passes hold the same for the same rows."""
        config = self.config
        fields = self.structure.to_dict()
        fields.pop("_name_or_path", None)  # a folder of its own for each job of a model that is made from its config
        parts = [
            fields,
            config.model.dtype,
            config.quant.model_dump_json(),
            config.lora.model_dump_json(),
            self.precision.dtype,
            str(self.start),
            getattr(config.recipe, "disable_dropout", False),
        ]
        return json.dumps(parts, default=str)


def _keep(known: dict[Any, Any], most: int, key: Any, value: Any) -> None:
    if len(known) >= most:
        del known[next(iter(known))]
    known[key] = value
