"""Checked rows, which may be more than fit in memory: JSON in one piece, in memory or mapped from a file."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator, Sequence
from typing import IO, Any, overload

from pydantic_core import from_json, to_json
from xxhash import xxh3_128

Row = dict[str, Any]


class Rows(Sequence[Row]):
    """The columns of checked rows, read from JSON when asked for.

    Args:
        data: The rows, one behind the other.
        ends: Where each ends.
        digest: What names their content.
    """

    def __init__(self, data: bytes | mmap.mmap, ends: array[int], digest: str) -> None:
        self._data, self._ends, self.digest = data, ends, digest

    @classmethod
    def mapped(cls, file: IO[bytes], ends: array[int], digest: str) -> Rows:
        """Return the rows of a file, which may be closed and removed afterwards."""
        return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), ends, digest)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Row]:
        start = 0
        for end in self._ends:
            yield from_json(self._data[start:end])
            start = end

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return dict(from_json(self._data[self._ends[place - 1] if place else 0 : self._ends[place]]))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Rows):
            return self.digest == other.digest
        return list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Rows({len(self)}, {self.digest})"


def digest_of(rows: Sequence[Row]) -> str:
    """Return what names the content of rows, the same for equal rows wherever they come from."""
    if isinstance(rows, Rows):
        return rows.digest
    digest = RowDigest()
    for row in rows:
        digest.add(to_json(row, inf_nan_mode="constants"), 1)
    return digest.name


class RowDigest:
    """Names rows by their JSON and their number, piece by piece."""

    def __init__(self) -> None:
        self._hash, self._rows = xxh3_128(), 0

    def add(self, as_json: bytes, rows: int) -> None:
        """Take rows in, one behind the other."""
        self._hash.update(as_json)
        self._rows += rows

    @property
    def name(self) -> str:
        """The digest of all that was taken in."""
        return f"{self._hash.hexdigest()}-{self._rows}"
