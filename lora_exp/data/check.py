"""One block of rows, checked: good rows as bytes, what they are known by, and why the others are bad.

This is the work that other processes share, so it takes and gives what is cheap to send.
"""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import to_json
from xxhash import xxh3_64_intdigest

from lora_exp.data.files import Block, arrow_rows
from lora_exp.data.jsonl import SHOWN, parse
from lora_exp.data.reasons import reasons
from lora_exp.data.sightings import SIGHTS, Sightings, normalised, strings

if TYPE_CHECKING:
    from lora_exp.data.kinds import RowKind


@dataclass
class Marks:
    """What the good rows are known by, one number a row.

    Args:
        numbers: Where they stand: lines, or rows of a Parquet file, from 1.
        ends: Where they end in the bytes of all rows.
        rows: Hashes of the rows as they are.
        near: Hashes of their texts less case, spaces and punctuation.
        prompts: The same of all but the answers.
        ids: Hashes of the ids; empty where the format has none.
    """

    numbers: array[int] = field(default_factory=lambda: array("Q"))
    ends: array[int] = field(default_factory=lambda: array("Q"))
    rows: array[int] = field(default_factory=lambda: array("Q"))
    near: array[int] = field(default_factory=lambda: array("Q"))
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    ids: array[int] = field(default_factory=lambda: array("Q"))

    def extend(self, other: Marks) -> None:
        """Put the marks of the rows that follow behind these."""
        before = self.ends[-1] if self.ends else 0
        self.ends.extend(before + end for end in other.ends)
        for name in ("numbers", "rows", "near", "prompts", "ids"):
            getattr(self, name).extend(getattr(other, name))


@dataclass
class Checked:
    """What was found in some rows.

    Args:
        rows: The good ones as JSON, one behind the other.
        marks: What they are known by.
        problems: The first `SHOWN` bad ones: their number and the reason.
        bad: How many are bad.
        seen: What is worth telling of good ones.
    """

    rows: bytes = b""
    marks: Marks = field(default_factory=Marks)
    problems: list[tuple[int, str]] = field(default_factory=list)
    bad: int = 0
    seen: Sightings = field(default_factory=Sightings)

    def refuse(self, number: int, why: str) -> None:
        """Account for a bad row."""
        self.bad += 1
        if len(self.problems) < SHOWN:
            self.problems.append((number, why))


@dataclass(frozen=True)
class Looked:
    """The good rows of a file or a data set: what they are known by, what is worth telling of them.

    Args:
        source: Where they are; numbers stand behind it.
        marks: What they are known by.
        seen: What is worth telling.
    """

    source: str
    marks: Marks
    seen: Sightings


class Checker:
    """Checks blocks of a file that is of one format.

    Args:
        kind: What the recipe learns from.
        format_index: Which of the kind's formats the file began with.
    """

    def __init__(self, kind: RowKind, format_index: int) -> None:
        self.kind = kind
        self.format = kind.formats[format_index]
        self.has_ids = "id" in self.format.row.model_fields

    def __call__(self, block: Block) -> Checked:
        """Check every row of a block."""
        found, rows = Checked(), []
        for number, row in objects(block):
            checked = self._check(number, row, found)
            if checked is not None:
                rows.append(checked)
        found.rows = b"".join(rows)
        if block.form == "lines":
            found.seen.look_at_lines(block.data, block.first)
        return found

    def _check(self, number: int, row: dict[str, Any] | ValueError, found: Checked) -> bytes | None:
        if isinstance(row, ValueError):
            found.refuse(number, str(row))
            return None
        try:
            model = self.format.row.model_validate(row)
        except ValidationError as error:
            why = self.kind.stranger(row, self.format) or reasons(error)
            found.refuse(number, why)
            return None
        if self.has_ids:
            found.marks.ids.append(xxh3_64_intdigest(str(getattr(model, "id", "")).encode()))
        return look_at(number, row, model.columns(), self.kind, found)


def look_at(number: int, row: Mapping[str, Any], columns: Mapping[str, Any], kind: RowKind, found: Checked) -> bytes:
    """Note what a good row is known by and what is worth telling of it; return its columns as JSON.

    Args:
        number: Where it stands.
        row: The row as it stands there.
        columns: The row as `Row.columns` gives it.
        kind: What the recipe learns from.
        found: Where it is noted.
    """
    as_json = to_json(columns, inf_nan_mode="constants")
    asked, answers = parts(columns, kind.answers)
    prompt = _normalised(asked)
    marks = found.marks
    marks.numbers.append(number)
    marks.ends.append((marks.ends[-1] if marks.ends else 0) + len(as_json))
    marks.rows.append(xxh3_64_intdigest(as_json))
    marks.prompts.append(xxh3_64_intdigest(prompt))
    marks.near.append(xxh3_64_intdigest(b"\0".join([prompt, *map(_normalised, answers)])))
    for name, sight in SIGHTS.items():
        if sight.seen(row, columns, as_json, kind):
            found.seen.add(name, number)
    return as_json


def look_at_rows(rows: Iterable[Mapping[str, Any]], source: str, kind: RowKind) -> Looked:
    """Look at rows that were checked elsewhere."""
    found = Checked()
    for number, columns in enumerate(rows, start=1):
        look_at(number, columns, columns, kind, found)
    return Looked(source, found.marks, found.seen)


def _normalised(value: Any) -> bytes:
    return normalised(value) if isinstance(value, str) else b"\0".join(map(normalised, strings(value)))


def parts(columns: Mapping[str, Any], answers: Sequence[str]) -> tuple[Any, list[Any]]:
    """Return what a row asks and its answers: of a conversation, its last message."""
    if "messages" in columns:
        return columns["messages"][:-1], columns["messages"][-1:]
    return columns["prompt"], [columns[name] for name in answers]


def objects(block: Block) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yield the rows of a block with their numbers; why it is none for each that is no object. Blank lines are none."""
    if block.refusal:
        yield block.first, ValueError(block.refusal)
    elif block.form == "arrow":
        yield from enumerate(arrow_rows(block.data), start=block.first)
    else:
        for number, line in enumerate(block.data.split(b"\n"), start=block.first):
            # An editor's byte-order mark at the start of the file is no part of the JSON.
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text or text.isspace():
                continue
            try:
                yield number, parse(text)
            except ValueError as error:
                yield number, error
