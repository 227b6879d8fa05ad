"""Rows that stand twice: in one file, or in the rows that are trained on and those that are evaluated on."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.data.files import in_file, place
from lora_exp.errors import Problem, count

if TYPE_CHECKING:
    from lora_exp.data.check import Looked
    from lora_exp.data.read import ReadFile


@dataclass(frozen=True)
class Finding:
    """Something that is no mistake and that the user should know.

    Args:
        name: What `data_report.json` calls it.
        number: How many rows.
        what: What they are or have, with the number.
        first: Where the first one is.
        mend: What may be done about it.
    """

    name: str
    number: int
    what: str
    first: str
    mend: str = ""

    def __str__(self) -> str:
        mend = f"; {self.mend}" if self.mend else ""
        return f"{self.what} (first: {self.first}){mend}"


@dataclass(frozen=True)
class Pair:
    """A row that stands in `val` and, the same or nearly, in `train`.

    Args:
        val: Where it is in the one.
        train: Where in the other, first.
        how: `exact`: the same row; `near`: its letters and digits are; `prompt`: those of its prompt are.
    """

    val: str
    train: str
    how: str


HOW = {
    "exact": ("row of val stands in train too", "rows of val stand in train too"),
    "near": (
        "row of val stands in train too, but for case, spaces and punctuation",
        "rows of val stand in train too, but for case, spaces and punctuation",
    ),
    "prompt": (
        "row of val has a prompt of train with another answer",
        "rows of val have a prompt of train with another answer",
    ),
}
LEAKS = ("exact", "near")
"""What spoils an evaluation. Another answer to the same prompt may be meant so."""


def repeated_ids(files: list[ReadFile]) -> Iterator[tuple[ReadFile, int, Problem]]:
    """Yield every row whose id an earlier row of these files has: its file, its number, the problem."""
    known: dict[int, tuple[Path, int]] = {}
    for file in files:
        for mark, number in zip(file.marks.ids, file.marks.numbers, strict=False):
            path, first = known.setdefault(mark, (file.path, number))
            if (path, first) != (file.path, number):
                same = in_file(path, first) if path == file.path else place(path, first)
                yield file, number, Problem(place(file.path, number), f"has the same id as {same}")


def repeated_rows(looked: Looked) -> Finding | None:
    """Return how many rows stand before among them already, letter for letter."""
    marks = looked.marks
    seen: set[int] = set()
    times, first = 0, 0
    for mark, number in zip(marks.rows, marks.numbers, strict=True):
        if mark in seen:
            times, first = times + 1, first or number
        seen.add(mark)
    if not times:
        return None
    what = count(times, "row repeats an earlier one", "rows repeat earlier ones")
    return Finding(
        "repeated_rows", times, what, place(looked.source, first), "each is learned from as often as it stands there"
    )


def shared_rows(train: Looked, val: Looked) -> list[Pair]:
    """Return the rows of `val` that are in `train`, each with the closest way in which it is, in their order."""
    ways = (("exact", "rows"), ("near", "near"), ("prompt", "prompts"))
    found: dict[int, Pair] = {}
    for how, name in ways:
        ours: array[int] = getattr(val.marks, name)
        theirs = _first_places(getattr(train.marks, name), set(ours))
        for index, mark in enumerate(ours):
            if mark in theirs and index not in found:
                where = place(train.source, train.marks.numbers[theirs[mark]])
                found[index] = Pair(place(val.source, val.marks.numbers[index]), where, how)
    return [found[index] for index in sorted(found)]


def _first_places(marks: array[int], wanted: set[int]) -> dict[int, int]:
    places: dict[int, int] = {}
    for index, mark in enumerate(marks):
        if mark in wanted:
            places.setdefault(mark, index)
    return places


def leak_findings(pairs: list[Pair]) -> list[Finding]:
    """Return what to say of rows that are in both splits, a line for each way."""
    findings = []
    for how, (one, many) in HOW.items():
        those = [pair for pair in pairs if pair.how == how]
        if those:
            first = f"{those[0].val} and {those[0].train}"
            mend = "data.on_leak=error stops on it" if how in LEAKS else ""
            findings.append(Finding(f"leak_{how}", len(those), count(len(those), one, many), first, mend))
    return findings
