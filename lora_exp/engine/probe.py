"""A few random rows, computed packed and one by one, forward and backward: does a model compute the same?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

import numpy as np
import torch

from lora_exp.data.kinds import IGNORED
from lora_exp.engine import attention, forward
from lora_exp.engine.forward import PackedForward
from lora_exp.engine.packing import Family, PackedRow, Row, pack
from lora_exp.machine import is_out_of_memory

TOLERANCE = {torch.float64: (1e-6, 1e-6), torch.float32: (1e-4, 1e-3)}
"""How far hidden states, and gradients, may lie apart, as a share of their size; a token that sees one it should not
moves them more. Half precision: `HALF_TOLERANCE`."""
HALF_TOLERANCE = (0.06, 0.3)


@dataclass(frozen=True)
class Probe:
    """Computes random rows on a model.

    Args:
        base: The model, its adapter layers inside.
        longest: Tokens of the longest row that will be trained on.
        dtype: What training computes in.
        no_dropout: Whether training drops nothing.
    """

    base: Any
    longest: int
    dtype: str
    no_dropout: bool

    def reason(self) -> str | None:
        """Return why the model does not compute the same packed, or None; the model then attends packed."""
        base = self.base
        before, training = base.config._attn_implementation, base.training
        base.eval()
        try:
            rows = _random_rows(base, self.longest)
            flat = pack([Family((row,)) for row in rows])
            with self._autocast():
                reason = self._difference(rows, flat)
                if reason is None:
                    self._train_once(flat)
        except _RefusedError as error:
            reason = f"{base.config.model_type}: {error}"
        finally:
            base.train(training)
        if reason is not None:
            base.set_attn_implementation(before)
        return reason

    def _autocast(self) -> Any:
        half = self.dtype != "float32"
        dtype = getattr(torch, self.dtype) if half else torch.bfloat16
        return torch.autocast(self.base.device.type, dtype, enabled=half and self.base.dtype != torch.float64)

    def _difference(self, rows: list[Row], flat: PackedRow) -> str | None:
        """Compare the last hidden states of all rows, and the gradients of a random sum of them."""
        packed = _packed(self.base, flat)
        states = [packed[torch.from_numpy(flat.places[row.index]).to(packed.device)] for row in rows]
        found = self._gradient(states)
        alone = [self._alone(row) for row in rows]
        off = max(_apart(*pair) for pair in zip(states, alone, strict=True))
        off_gradient = _apart(found, self._gradient(alone))
        allowed, allowed_gradient = self._allowed(packed.dtype)
        if off <= allowed and off_gradient <= allowed_gradient:
            return None
        return (
            f"on random rows {self.base.config.model_type} computes something else packed "
            f"(hidden states off by {off:.1%}, gradients by {off_gradient:.1%})"
        )

    def _alone(self, row: Row) -> torch.Tensor:
        ids = torch.from_numpy(row.ids)[None].to(self.base.device)
        hidden: torch.Tensor = self.base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        return hidden

    def _gradient(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Return the gradient of everything that trains, flat.

        Raises:
            _RefusedError: If a library's backward pass fails.
        """
        trained = [each for each in self.base.parameters() if each.requires_grad]
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(each.shape, generator=generator).to(each) for each in states]
        total = sum((state * weight).float().sum() for state, weight in zip(states, weights, strict=True))
        if not trained or not total.requires_grad:
            return torch.zeros(1)
        try:
            found = torch.autograd.grad(total, trained, allow_unused=True)
        except (NotImplementedError, RuntimeError) as error:
            if _is_of_the_device(error) or not _is_of_a_library(error):
                raise
            raise _RefusedError(_first_line(error)) from error
        parts = (torch.zeros_like(one) if each is None else each for one, each in zip(trained, found, strict=True))
        return torch.cat([each.flatten().float() for each in parts])

    def _allowed(self, dtype: torch.dtype) -> tuple[float, float]:
        """Return how far states and gradients may lie apart: as the lowest dtype that a layer multiplies in."""
        computed = {getattr(layer, "compute_dtype", None) for layer in self.base.modules()}
        half = {torch.bfloat16, torch.float16} & {dtype, *computed}
        return HALF_TOLERANCE if half or self.dtype != "float32" else TOLERANCE[dtype]

    def _train_once(self, flat: PackedRow) -> None:
        """Compute as in training, where an attention may drop weights that no field of the config names.

        TRL's disable_dropout reaches layers alone; a share that is a number in the attention stays.
        """
        layers = [(layer, layer.p) for layer in self.base.modules() if isinstance(layer, torch.nn.Dropout)]
        self.base.train()
        devices = [self.base.device] if self.base.device.type == "cuda" else []
        try:
            for layer, _ in layers:
                layer.p = 0.0 if self.no_dropout else layer.p
            with torch.no_grad(), torch.random.fork_rng(devices):
                _packed(self.base, flat)
        finally:
            for layer, share in layers:
                layer.p = share


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far two tensors lie apart, as a share of the second's size; infinite where a number is none."""
    size = float(expected.detach().norm())
    apart = float((found.detach() - expected.detach()).norm()) / (size or 1.0)
    return apart if math.isfinite(apart) else math.inf


class _RefusedError(Exception):
    """A model takes no flat row."""


def _packed(base: Any, row: PackedRow) -> torch.Tensor:
    """Return the last hidden states of one flat row.

    Raises:
        _RefusedError: If the model's own code or our attention cannot deal with it.
    """
    try:
        return PackedForward(base).hidden(row)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        # Models raise all of these over a mask or positions that they do not expect (OpenAI GPT, BLOOM, XLM), so the
        # place tells a refusal from a mistake of ours.
        if _is_of_the_device(error) or not _is_a_refusal(error):
            raise
        raise _RefusedError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _is_of_the_device(error: Exception) -> bool:
    """Whether memory ran out or the device failed; the padded forward would need more memory, not less."""
    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or is_out_of_memory(error)


def _is_a_refusal(error: Exception) -> bool:
    """Whether it comes from the model, below `PackedForward`, or from the attention that the model calls."""
    modules: list[str] = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    last = max(number for number, name in enumerate(modules) if name.startswith("lora_exp."))
    called = modules[last + 1 : last + 2]
    return modules[last] == attention.__name__ or (
        modules[last] == forward.__name__ and called == [torch.nn.modules.module.__name__]
    )


def _is_of_a_library(error: Exception) -> bool:
    """Whether a backward pass failed in code that is not ours: this file called last."""
    modules: list[str] = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    return next(name for name in reversed(modules) if name.startswith("lora_exp.")) == __name__


def _random_rows(base: Any, longest: int) -> list[Row]:
    """Return rows that share starts, and one of its own; where a window is shorter than the longest row, it is longer.

    Four start alike, and two by two of them go on alike, as the rows of preference pairs with one system message do.
    """
    config = base.config.get_text_config()
    random = np.random.default_rng(0)
    window = getattr(config, "sliding_window", None)
    long = window + 8 if window and window < longest else 24

    def drawn(length: int) -> Any:
        return random.integers(0, config.vocab_size, length)

    system, prompts = drawn(4), [drawn(5) for _ in range(2)]
    starts = [np.concatenate([system, prompt]) for prompt in prompts]
    texts = [np.concatenate([start, drawn(length)]) for start in starts for length in (5, 7)]
    return [
        Row(number, ids.astype(np.int64), np.full(len(ids), IGNORED))
        for number, ids in enumerate([*texts, drawn(long)])
    ]
