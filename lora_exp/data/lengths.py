"""How long rows are before anything is cut, kept so that other limits can be tried without tokenising again."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt


class RowLengths:
    """Tokens of each row, a few bytes a row.

    Args:
        answers: How many answers a row has; known from the first one.
        numbers: Those of the rows so far.
        common: Tokens from the start on that all their prompts share, such as a system message.
    """

    def __init__(self, answers: int = 0, numbers: Iterable[int] = (), common: int = 0) -> None:
        self.answers = answers
        self.common = common
        self._numbers = array("I", numbers)
        self._start: Sequence[int] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowLengths) and self.as_dict() == other.as_dict()

    def as_dict(self) -> dict[str, Any]:
        """Return what `RowLengths(**kept)` makes the same of, as JSON keeps it."""
        return {"answers": self.answers, "numbers": self._numbers.tolist(), "common": self.common}

    def __len__(self) -> int:
        return len(self._numbers) // (self.answers + 2)

    def add(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> None:
        """Note a row's token ids before anything is cut."""
        if not self._numbers:
            self._start = prompt
        self._start = self._start[: _alike((self._start, prompt))]
        self.common = len(self._start)
        self.answers = len(answers)
        self._numbers.append(len(prompt))
        self._numbers.extend(map(len, answers))
        self._numbers.append(_alike(answers))

    @property
    def prompts(self) -> npt.NDArray[Any]:
        """Tokens of each prompt [rows]."""
        return self._table[:, 0]

    @property
    def completions(self) -> npt.NDArray[Any]:
        """Tokens of each answer [rows, answers]."""
        return self._table[:, 1:-1]

    @property
    def alike(self) -> npt.NDArray[Any]:
        """Tokens from the start on that all answers of a row share [rows]."""
        return self._table[:, -1]

    @property
    def longest(self) -> npt.NDArray[Any]:
        """Tokens of each prompt with the longer of its answers [rows]."""
        longest: npt.NDArray[Any] = self.prompts + self.completions.max(axis=1)
        return longest

    @property
    def _table(self) -> npt.NDArray[Any]:
        import numpy as np

        return np.asarray(self._numbers, dtype=np.int64).reshape(-1, self.answers + 2)


def _alike(texts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens from the start on are the same in all."""
    first = texts[0]
    shared = len(first)
    for other in texts[1:]:
        if first[:shared] != other[:shared]:
            shared = next(i for i in range(shared) if i >= len(other) or first[i] != other[i])
    return shared
