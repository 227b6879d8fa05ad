"""Files read and checked from end to end, by several processes where they are large; all that is wrong at once."""

from __future__ import annotations

import tempfile
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lora_exp.data.cache import Cache, Entry, file_digest, key_of
from lora_exp.data.check import Checked, Checker, Looked, Marks, objects
from lora_exp.data.duplicates import repeated_ids
from lora_exp.data.files import BLOCK_BYTES, Block, Unreadable, blocks, place, refusal
from lora_exp.data.jsonl import SHOWN
from lora_exp.data.rows import RowDigest, Rows
from lora_exp.data.sightings import Sightings
from lora_exp.errors import Problem, UserError, count
from lora_exp.process.threads import usable_cores

if TYPE_CHECKING:
    from lora_exp.data.kinds import RowKind

ROWS = "rows.json"
"""The file of checked rows in an entry of the cache."""

KEPT_FROM_BYTES = 16 * 2**20
"""Smaller files are checked sooner than it is worth to keep what was found."""

ALONE = 6
"""Blocks that this process checks before it starts others: they take a while to start."""

SPILLED_FROM_BYTES = 64 * 2**20
"""What is held of checked rows in memory; more goes into a file."""


@dataclass
class ReadFile:
    """A file that was read.

    Args:
        path: The file.
        rows: The good rows.
        marks: What they are known by.
        seen: What is worth telling of them.
        format: The name of their format; empty where there is none.
        problems: The first bad rows, and what else is wrong with the file.
        bad: How many rows are bad.
        from_cache: Whether what an earlier run found was used.
    """

    path: Path
    rows: Rows
    marks: Marks = field(default_factory=Marks)
    seen: Sightings = field(default_factory=Sightings)
    format: str = ""
    problems: list[Problem] = field(default_factory=list)
    bad: int = 0
    from_cache: bool = False

    @property
    def looked(self) -> Looked:
        """What its good rows are known by."""
        return Looked(str(self.path), self.marks, self.seen)


def read_files(paths: list[Path], kind: RowKind, cache: Cache) -> list[ReadFile]:
    """Read and check files of one kind.

    Raises:
        UserError: All bad rows of all files, rows with the same id, and files that cannot be read or hold no row.
    """
    problems = [problem for path in paths if (problem := refusal(path))]
    if problems:
        raise UserError("the data cannot be read", problems)
    files = [read_file(path, kind, cache) for path in paths]
    for file, _, problem in repeated_ids(files):
        file.bad += 1
        if file.bad <= SHOWN:
            file.problems.append(problem)
    _require_sound(files)
    return files


def _require_sound(files: list[ReadFile]) -> None:
    found = []
    for file in files:
        found += file.problems
        named = sum(problem.where != str(file.path) for problem in file.problems)
        if file.bad > named:
            more = count(file.bad - named, "more bad line")
            found.append(Problem(str(file.path), f"and {more} ({file.bad:,} in all)"))
    bad = sum(file.bad for file in files)
    if found:
        raise UserError(f"{count(bad, 'line')} of the data cannot be used" if bad else "the data cannot be used", found)


def read_file(
    path: Path, kind: RowKind, cache: Cache, block_bytes: int = BLOCK_BYTES, cores: int | None = None
) -> ReadFile:
    """Read and check a file, or find what an earlier run found in the same bytes.

    Args:
        path: The file.
        kind: What the recipe learns from.
        cache: Where large files' rows are kept.
        block_bytes: How much is checked at a time.
        cores: How many processes may check; None: as many as this one may use cores.
    """
    try:
        key = _key(path, kind) if path.stat().st_size >= KEPT_FROM_BYTES and cache.max_size else None
    except OSError as error:
        return _unread(path, Problem(str(path), f"cannot be read: {error.strerror}"))
    entry = cache.find(key) if key else None
    if entry is not None:
        return _kept(path, entry)
    try:
        return _read(path, kind, key, cache, block_bytes, usable_cores() if cores is None else cores)
    except OSError as error:
        mend = "they need as much room as the file: in $TMPDIR, or in $LORA_EXP_CACHE unless data.cache_size=0"
        return _unread(path, Problem(str(path), f"its rows cannot be put aside: {error.strerror}", mend))


def _read(path: Path, kind: RowKind, key: str | None, cache: Cache, block_bytes: int, cores: int) -> ReadFile:
    with ExitStack() as stack:
        reading = _Reading(path, kind, stack, cache if key else None)
        try:
            reading.read(blocks(path, block_bytes), cores)
        except Unreadable as error:
            reading.problems.append(Problem(str(path), error.what, error.mend))
        file = reading.file()
        if key and not file.problems:
            reading.keep(key, file)
        return file


def _unread(path: Path, problem: Problem) -> ReadFile:
    return ReadFile(path, Rows(b"", array("Q"), ""), problems=[problem])


class _Reading:
    """What is gathered while a file is read."""

    def __init__(self, path: Path, kind: RowKind, stack: ExitStack, cache: Cache | None) -> None:
        self.path, self.kind, self.stack, self.cache = path, kind, stack, cache
        self.marks, self.seen, self.digest = Marks(), Sightings(), RowDigest()
        self.problems: list[Problem] = []
        self.bad = 0
        self.format = ""
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._spilled: IO[bytes] | None = None
        self._folder: Path | None = None

    def read(self, source: Iterator[Block], cores: int) -> None:
        """Check all blocks.

        Raises:
            Unreadable: If the file cannot be read to its end.
        """
        for block in source:
            try:
                index = _format_index(block, self.kind)
            except _NoFormat as error:
                self._add(Checked(problems=[(error.number, str(error))], bad=1))
                return
            if index is None:
                self._add(Checker(self.kind, 0)(block))
                continue
            self.format = self.kind.formats[index].name
            for checked in _checked(chain([block], source), Checker(self.kind, index), cores):
                self._add(checked)

    def _add(self, checked: Checked) -> None:
        self.digest.add(checked.rows, len(checked.marks.ends))
        self.marks.extend(checked.marks)
        self.seen.extend(checked.seen)
        self.bad += checked.bad
        room = SHOWN - len(self.problems)
        self.problems += [Problem(place(self.path, number), why) for number, why in checked.problems[:room]]
        self._put(checked.rows)

    def _put(self, rows: bytes) -> None:
        if self._spilled is not None:
            self._spilled.write(rows)
            return
        self._held.append(rows)
        self._held_bytes += len(rows)
        if self._held_bytes > SPILLED_FROM_BYTES:
            self._spilled = self._spill()

    def _spill(self) -> IO[bytes]:
        # What is not kept has no name, so that nothing is left of it after a kill.
        target = (self._draft() / ROWS).open("w+b") if self.cache else tempfile.TemporaryFile()  # noqa: SIM115
        spilled = self.stack.enter_context(target)
        spilled.writelines(self._held)
        self._held = []
        return spilled

    def _draft(self) -> Path:
        assert self.cache is not None
        if self._folder is None:
            self._folder = self.stack.enter_context(self.cache.draft())
        return self._folder

    def file(self) -> ReadFile:
        """Return what was read."""
        if not self.marks.ends and not self.problems:
            self.problems.append(Problem(str(self.path), "has no rows"))
        if self._spilled is None:
            rows = Rows(b"".join(self._held), self.marks.ends, self.digest.name)
        else:
            self._spilled.flush()
            rows = Rows.mapped(self._spilled, self.marks.ends, self.digest.name)
        return ReadFile(self.path, rows, self.marks, self.seen, self.format, self.problems, self.bad)

    def keep(self, key: str, file: ReadFile) -> None:
        """Put it into the cache."""
        assert self.cache is not None
        (self._spilled or self._spill()).flush()
        draft = self._draft()
        try:
            for name, values in _arrays(self.marks).items():
                (draft / f"{name}.marks").write_bytes(values.tobytes())
        except OSError as error:
            self.cache.failed(error)
            return
        facts = {"seen": file.seen.found, "format": file.format, "digest": file.rows.digest}
        self.cache.keep(draft, key, facts)


def _arrays(marks: Marks) -> dict[str, array[int]]:
    return {name: getattr(marks, name) for name in marks.__dataclass_fields__}


def _key(path: Path, kind: RowKind) -> str:
    suffix = "".join(path.suffixes[-2:])
    formats = [each.name for each in kind.formats]
    return key_of("rows", file=file_digest(path), suffix=suffix, formats=formats)


def _kept(path: Path, entry: Entry) -> ReadFile:
    marks = Marks()
    for name, values in _arrays(marks).items():
        values.frombytes((entry.folder / f"{name}.marks").read_bytes())
    with (entry.folder / ROWS).open("rb") as file:
        rows = Rows.mapped(file, marks.ends, entry.facts["digest"])
    seen = Sightings({name: tuple(found) for name, found in entry.facts["seen"].items()})
    return ReadFile(path, rows, marks, seen, entry.facts["format"], from_cache=True)


class _NoFormat(Exception):  # noqa: N818
    def __init__(self, number: int, why: str) -> None:
        super().__init__(why)
        self.number = number


def _format_index(block: Block, kind: RowKind) -> int | None:
    """Return the format of the first row of a block that has one; None where it has no row at all."""
    unknown: _NoFormat | None = None
    for number, row in objects(block):
        if isinstance(row, ValueError):
            continue
        try:
            return kind.formats.index(kind.recognise(row))
        except ValueError as error:
            if unknown is None:
                unknown = _NoFormat(number, str(error))
    if unknown is not None:
        raise unknown
    return None


def _checked(source: Iterator[Block], checker: Checker, cores: int) -> Iterator[Checked]:
    """Yield what was found in each block, in their order."""
    yield from map(checker, islice(source, None if cores < 2 else ALONE))
    later = next(source, None)
    if later is not None:
        yield from _by_others(chain([later], source), checker, cores)


def _by_others(source: Iterator[Block], checker: Checker, cores: int) -> Iterator[Checked]:
    from lora_exp.data.workers import workers

    waiting: deque[Future[Checked]] = deque()
    with workers(cores) as pool:
        for block in source:
            waiting.append(pool.submit(checker, block))
            if len(waiting) > cores + 2:  # so that no more blocks are held than are worked on
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
