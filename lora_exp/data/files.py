"""Data files opened by their name: JSON Lines, plain or compressed, and Parquet, read in blocks of whole rows.

A block is what is checked at a time, here or in another process, so that a file of any size needs the memory of a few.
"""

from __future__ import annotations

import gzip
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from lora_exp.errors import Problem, count

if TYPE_CHECKING:
    import pyarrow

BLOCK_BYTES = 4 * 2**20
"""Bytes that are read at a time, once decompressed."""

MOST_ROWS = 8192
"""Rows of a Parquet file that are read at a time, if they are short."""

MAX_LINE_MIB = 16
MAX_LINE_BYTES = MAX_LINE_MIB * 2**20
"""A longer line is no row, but a file without line ends; no more of it than this and a block is held in memory."""

TOO_LONG = f"is longer than {MAX_LINE_MIB} MiB, which is no row that a model can learn from"

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""What the name of a data file ends in, in the order in which a default name is looked for."""

MAGIC = {".gz": (b"\x1f\x8b", "gzip"), ".zst": (b"\x28\xb5\x2f\xfd", "zstd"), ".parquet": (b"PAR1", "Parquet")}
"""Suffix to how such a file begins and what it is called."""

HEAD_BYTES = 4096
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""The byte-order marks of UTF-16, which begin those of UTF-32 too, in either order."""


@dataclass(frozen=True)
class Block:
    """Some rows of a file, one after another, as they stand in it.

    Args:
        first: The number of the first line, or row of a Parquet file, from 1.
        data: Lines, or a stream of Arrow record batches.
        form: Which of these it is.
        refusal: Why it is no row; its line has been passed over then.
    """

    first: int
    data: bytes
    form: Literal["lines", "arrow"] = "lines"
    refusal: str = ""


class Unreadable(Exception):  # noqa: N818 - a finding of the reader, which names the file
    """Raised where reading a file cannot go on.

    Args:
        what: Why, as a sentence without its subject, the file.
        mend: What to do about it.
    """

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(what)
        self.what, self.mend = what, mend


def place(path: Path | str, number: int) -> str:
    """Return where a row is: `file:line`, or `file:row N` in a Parquet file, which has no lines."""
    return f"{path}:row {number}" if str(path).endswith(".parquet") else f"{path}:{number}"


def in_file(path: Path, number: int) -> str:
    """Return where in a file a row is: `line N` or `row N`."""
    return f"row {number}" if path.name.endswith(".parquet") else f"line {number}"


def with_any_suffix(path: Path) -> Path:
    """Return the file of this name (`train.jsonl`) that is there, compressed or as Parquet if need be."""
    stem = path.name.removesuffix(".jsonl")
    found = (path.with_name(stem + suffix) for suffix in SUFFIXES)
    return next((each for each in found if each.exists()), path)


def refusal(path: Path) -> Problem | None:
    """Return why a file cannot be what its name says, with the likely mend; None where reading may begin."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return Problem(str(path), "is a folder, not a file", _files_of(path))
        if not stat.S_ISREG(mode):
            return Problem(str(path), "is no regular file", "write the rows into one")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        return Problem(str(path), "there is no such file", _neighbours(path))
    except OSError as error:
        return Problem(str(path), f"cannot be read: {error.strerror}")
    return _misnamed(path, head) if head else None


def _misnamed(path: Path, head: bytes) -> Problem | None:
    named = next((suffix for suffix in MAGIC if path.name.endswith(suffix)), None)
    found = next((suffix for suffix, (magic, _) in MAGIC.items() if head.startswith(magic)), None)
    if found == named:
        return None
    if found is None:
        assert named is not None
        return Problem(str(path), f"is no {MAGIC[named][1]} file, though its name says so", "name it after what it is")
    ending = next(each for each in SUFFIXES if each.endswith(found))
    return Problem(str(path), f"is a {MAGIC[found][1]} file", f"let its name end in {ending}")


def _neighbours(path: Path) -> str:
    """Name the data files of the folder, or the part of the path that exists."""
    return _files_of(path.parent) if path.parent.is_dir() else f"the folder {path.parent} does not exist"


def _files_of(folder: Path) -> str:
    try:
        names = sorted(each.name for each in folder.iterdir() if each.name.endswith(SUFFIXES))
    except OSError as error:
        return f"{folder} cannot be looked into: {error.strerror}"
    return f"{folder} has {', '.join(names[:8])}" if names else f"{folder} has no {' or '.join(SUFFIXES)} file"


def blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Yield a file's rows from first to last.

    Args:
        path: A file; its name says how it is compressed.
        block_bytes: How much is read at a time.

    Raises:
        Unreadable: If it is damaged, not what it should be, or changes while it is read.
    """
    read = _parquet_blocks if path.name.endswith(".parquet") else _line_blocks
    with _readable(), path.open("rb") as file:
        before = os.fstat(file.fileno())
        if not before.st_size:
            return
        try:
            yield from read(file, block_bytes)
        except Exception:
            _check_unchanged(file, before)  # said in place of what it led to, say an end inside a compressed part
            raise
        _check_unchanged(file, before)


def _check_unchanged(file: IO[bytes], before: os.stat_result) -> None:
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise Unreadable("was changed while it was read", "start again when nothing writes to it")


@contextmanager
def _readable() -> Iterator[None]:
    """Say what the libraries raise in our words."""
    try:
        yield
    except FileNotFoundError as error:
        raise Unreadable("is no longer there") from error
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:  # the last: a column's name
        raise Unreadable(f"is damaged: {_sentence(error)}", DAMAGED_MEND) from error
    except OSError as error:  # pyarrow raises its own errors as one without a number
        known = f"cannot be read: {error.strerror}" if error.errno else f"is damaged: {_sentence(error)}"
        raise Unreadable(known, "" if error.errno else DAMAGED_MEND) from error


DAMAGED_MEND = "fetch or write the file again"


def _sentence(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__


@contextmanager
def _decompressed(file: IO[bytes]) -> Iterator[Callable[[int], bytes]]:
    """Give what reads from a file, by its name, up to so many bytes."""
    if str(file.name).endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as stream:
            yield stream.read
    elif str(file.name).endswith(".zst"):
        import pyarrow

        # Unlike other bindings it refuses a file that ends inside a frame.
        with _for_arrow(file) as copy, pyarrow.CompressedInputStream(pyarrow.PythonFile(copy, "r"), "zstd") as stream:
            yield lambda size: bytes(stream.read(size))
    else:
        yield file.read


def _for_arrow(file: IO[bytes]) -> IO[bytes]:
    """Return the file under another descriptor: pyarrow closes the one that it is given."""
    return os.fdopen(os.dup(file.fileno()), "rb")


def _line_blocks(file: IO[bytes], block_bytes: int) -> Iterator[Block]:
    number, rest, begun = 1, b"", False
    with _decompressed(file) as read:
        while data := read(block_bytes):
            if not begun:
                _check_head(data)
                begun = True
            end = data.rfind(b"\n") + 1
            rest, data = rest + data[: end or len(data)], data[end or len(data) :]
            if end:
                yield Block(number, rest)
                number, rest = number + rest.count(b"\n"), data
            elif len(rest) > MAX_LINE_BYTES:
                yield Block(number, b"", refusal=TOO_LONG)
                number, rest = number + 1, _after_line(read, block_bytes)
    if rest:
        yield Block(number, rest)


def _after_line(read: Callable[[int], bytes], block_bytes: int) -> bytes:
    """Pass over the rest of a line; return what was read of the lines after it."""
    while data := read(block_bytes):
        _, end, after = data.partition(b"\n")
        if end:
            return after
    return b""


def _check_head(head: bytes) -> None:
    # JSON begins with two ASCII characters, so that in UTF-16 one byte of each is 0.
    if head.startswith(WIDE_MARKS) or re.match(rb"\0[^\0]\0[^\0]|[^\0]\0[^\0]\0", head):
        raise Unreadable("is UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8 OLD > NEW")
    if re.match(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{", head[:HEAD_BYTES]):
        raise Unreadable("is one JSON array, not JSON Lines: one object a line", "jq -c '.[]' OLD > NEW")


def _parquet_blocks(file: IO[bytes], block_bytes: int) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    number = 1
    try:
        with _for_arrow(file) as copy, parquet.ParquetFile(copy, page_checksum_verification=True) as table:
            sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
            rows = max(1, min(MOST_ROWS, block_bytes * table.metadata.num_rows // max(sum(sizes), 1)))
            for group in range(table.num_row_groups):  # one reader of all would hold something of each
                begun, told = number, table.metadata.row_group(group).num_rows
                for batch in table.iter_batches(batch_size=rows, row_groups=[group]):
                    yield Block(number, _stream(batch), form="arrow")
                    number += batch.num_rows
                if number - begun != told:  # page headers have no checksum
                    what = f"is damaged: {count(told, 'row')} should stand from row {begun} on, not {number - begun:,}"
                    raise Unreadable(what, DAMAGED_MEND)
    except pyarrow.ArrowException as error:
        raise Unreadable(f"is damaged: {_sentence(error)}", DAMAGED_MEND) from error


def _stream(batch: pyarrow.RecordBatch) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def arrow_rows(data: bytes) -> list[dict[str, Any]]:
    """Return the rows of an Arrow stream as JSON would have them: times as ISO 8601, no nulls inside objects."""
    import pyarrow

    rows = pyarrow.ipc.open_stream(data).read_all().to_pylist()
    return [{key: _plain(item) for key, item in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    # The objects of a column have the keys of all of them; null stands where one has it not.
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else value
