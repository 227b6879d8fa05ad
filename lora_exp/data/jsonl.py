"""JSON Lines files, checked line by line: every bad line is reported at once as `file:line: reason`."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from lora_exp.data.formats import Row, RowFormat
from lora_exp.data.kinds import RowKind
from lora_exp.data.reasons import json_type, reasons
from lora_exp.errors import Problem, UserError, count

SHOWN = 20
"""Bad lines that are named one by one; the rest are counted."""


class JsonlFile:
    """A file of one JSON object a line, each a row of the kind, all in one format. Blank lines are skipped.

    Iterating yields the good rows and gathers the bad lines in `problems` (the first `SHOWN` of them) and
    `bad_lines` (their number). `format` is that of the first row that has one.
    """

    def __init__(self, path: Path, kind: RowKind) -> None:
        self.path = path
        self.kind = kind
        self.format: RowFormat | None = None
        self.problems: list[Problem] = []
        self.bad_lines = 0

    def __iter__(self) -> Iterator[Row]:
        self.problems, self.bad_lines, self.format = [], 0, None
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                # An editor's byte-order mark before the first line is no part of the JSON.
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not text.strip():
                    continue
                row = self._parse(text, number)
                if row is not None:
                    yield row

    def _parse(self, line: bytes, number: int) -> Row | None:
        try:
            row = _object(line)
            self.format = self.format or self.kind.recognise(row)
        except ValueError as error:
            self._bad(number, str(error))
            return None
        try:
            return self.format.row.model_validate(row)
        except ValidationError as error:
            stranger = self.kind.stranger(row, self.format)
            self._bad(number, stranger or reasons(error))
        return None

    def _bad(self, number: int, reason: str) -> None:
        self.bad_lines += 1
        if len(self.problems) < SHOWN:
            self.problems.append(Problem(f"{self.path}:{number}", reason))


def _object(line: bytes) -> dict[str, object]:
    """Return the object on a line.

    Raises:
        ValueError: If it is none; the message says why.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object, not {json_type(value)}")
    return value


def read_all(files: list[JsonlFile]) -> list[list[Row]]:
    """Read every file and return its rows.

    Raises:
        UserError: All bad lines of all files, or the files that are missing or hold no row.
    """
    problems = [problem for file in files if (problem := _unreadable(file.path))]
    if problems:
        raise UserError("the data cannot be read", problems)
    rows = [list(file) for file in files]
    bad_lines = sum(file.bad_lines for file in files)
    if bad_lines:
        found = [problem for file in files for problem in file.problems]
        for file in files:
            if file.bad_lines > len(file.problems):
                more = count(file.bad_lines - len(file.problems), "more bad line")
                found.append(Problem(str(file.path), f"and {more} ({file.bad_lines:,} in all)"))
        raise UserError(f"{count(bad_lines, 'line')} of the data cannot be used", found)
    empty = [Problem(str(file.path), "has no rows") for file, found in zip(files, rows, strict=True) if not found]
    if empty:
        raise UserError("the data cannot be used", empty)
    return rows


def _unreadable(path: Path) -> Problem | None:
    """Return why a file cannot be opened for reading, with the likely mend."""
    try:
        with path.open("rb"):
            return None
    except FileNotFoundError:
        return Problem(str(path), "there is no such file", _neighbours(path))
    except OSError as error:
        return Problem(str(path), f"cannot be read: {error.strerror}")


def _neighbours(path: Path) -> str:
    """Name the JSON Lines files of the folder, or the part of the path that exists."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    names = sorted(other.name for other in path.parent.glob("*.jsonl"))
    return f"{path.parent} has {', '.join(names[:8])}" if names else f"{path.parent} has no .jsonl file"
