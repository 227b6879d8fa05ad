"""What a limit of tokens does to rows: how many it cuts and drops, here and at other values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_exp.data.lengths import RowLengths
from lora_exp.data.tokenize import Limits

STEP = 64
"""A `max_length` that is proposed is a multiple of this."""

BINS = 12
"""Bars of a histogram at most."""


@dataclass(frozen=True)
class Effect:
    """What a limit does to the rows of a split.

    Args:
        limits: The limit.
        rows: How many there are.
        dropped: Rows of which nothing is left to learn.
        cut: Rows that lose tokens and are kept.
        cut_tokens: The tokens that those lose.
    """

    limits: Limits
    rows: int
    dropped: int
    cut: int
    cut_tokens: int

    @property
    def dropped_share(self) -> float:
        """Dropped rows as a share of all."""
        return self.dropped / max(self.rows, 1)

    @property
    def cut_share(self) -> float:
        """Cut rows as a share of all."""
        return self.cut / max(self.rows, 1)


@dataclass(frozen=True)
class Shortened:
    """Lengths after a cut: prompts [rows], answers [rows, answers], and which rows are kept [rows]."""

    prompts: npt.NDArray[Any]
    answers: npt.NDArray[Any]
    kept: npt.NDArray[Any]

    def examples(self) -> npt.NDArray[Any]:
        """Return prompt and answers of the rows that are kept [kept rows, 1 + answers]."""
        kept: npt.NDArray[Any] = np.column_stack([self.prompts, self.answers])[self.kept]
        return kept


def shorten(lengths: RowLengths, limits: Limits) -> Shortened:
    """Cut lengths as `lora_exp.data.tokenize` cuts token ids."""
    limit = limits.max_length if limits.max_prompt_length is None else limits.max_prompt_length
    prompts = np.minimum(lengths.prompts, limit)
    answers = np.minimum(lengths.completions, np.maximum(limits.max_length - prompts, 0)[:, None])
    gone = (answers == 0).any(axis=1)
    if lengths.answers > 1:
        first = answers[:, 0]
        gone |= (answers == first[:, None]).all(axis=1) & (lengths.alike >= first)
    return Shortened(prompts, answers, ~gone)


def effect(lengths: RowLengths, limits: Limits) -> Effect:
    """Return what limits do to rows of these lengths."""
    short = shorten(lengths, limits)
    lost = lengths.prompts - short.prompts + (lengths.completions - short.answers).sum(axis=1)
    cut = (lost > 0) & short.kept
    return Effect(limits, len(lengths), int((~short.kept).sum()), int(cut.sum()), int(lost[cut].sum()))


def with_length(limits: Limits, max_length: int) -> Limits:
    """Return limits with another `max_length`; prompts keep their half of it where they have just that."""
    prompt = limits.max_prompt_length
    if prompt is None:
        return replace(limits, max_length=max_length)
    half = prompt == limits.max_length // 2
    return replace(
        limits, max_length=max_length, max_prompt_length=max_length // 2 if half else min(prompt, max_length - 1)
    )


def other_limits(lengths: RowLengths, limits: Limits) -> list[Limits]:
    """Return limits to try: powers of two up to the longest row, and the ones there are; shortest first."""
    longest = int(lengths.longest.max())
    powers = [2**power for power in range(7, 18)]
    enough = next((each for each in powers if each >= longest), powers[-1])
    tried = {each: with_length(limits, each) for each in powers if each <= enough}
    return [each for _, each in sorted({**tried, limits.max_length: limits}.items())]


def other_prompt_limits(lengths: RowLengths, limits: Limits) -> list[Limits]:
    """Return the same `max_length` with other limits of the prompt: powers of two below it, and the one there is."""
    longest = int(lengths.prompts.max())
    powers = [2**power for power in range(5, 18)]
    enough = next((each for each in powers if each >= longest), powers[-1])
    tried = {each for each in powers if each <= enough and each < limits.max_length}
    if limits.max_prompt_length is not None:
        tried.add(limits.max_prompt_length)
    return [replace(limits, max_prompt_length=each) for each in sorted(tried)]


def sufficient(lengths: RowLengths, limits: Limits, enough: Callable[[Effect], bool]) -> Effect | None:
    """Return the effect of the smallest larger `max_length` that is enough; None where none is."""
    low, high = limits.max_length // STEP + 1, -(-2 * int(lengths.longest.max()) // STEP) + 1
    if low > high or not enough(effect(lengths, with_length(limits, STEP * high))):
        return None
    while low < high:
        middle = (low + high) // 2
        if enough(effect(lengths, with_length(limits, STEP * middle))):
            high = middle
        else:
            low = middle + 1
    return effect(lengths, with_length(limits, STEP * high))


@dataclass(frozen=True)
class Bar:
    """Rows of `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


def histogram(values: npt.NDArray[Any] | Sequence[int]) -> list[Bar]:
    """Return at most `BINS` bars of equal width, a round number of tokens, from the shortest row to the longest."""
    numbers = np.asarray(values)
    least, most = int(numbers.min()), int(numbers.max())
    width = next(each for each in _round_numbers() if most // each - least // each < BINS)
    first = least // width
    counts = np.bincount(numbers // width - first)
    return [Bar((first + n) * width, (first + n + 1) * width - 1, int(rows)) for n, rows in enumerate(counts)]


def _round_numbers() -> Any:
    size = 1
    while True:
        yield from (size, 2 * size, 4 * size, 5 * size)
        size *= 10
