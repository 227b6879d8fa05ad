"""The reference store: what a reference model says of token ids, kept across runs in one SQLite file.

A value depends on who computed it (the identity) and on the token ids (the key), and on nothing else; it is never
changed, only added and, where the store grows too large, dropped: what was not used for longest goes first.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_exp.engine.digests import file_digest
from lora_exp.engine.store_file import StoreFile, refusal
from lora_exp.errors import Problem, UserError
from lora_exp.models.source import cache_dir

FILLED_AGAIN = 0.9
"""The share of `max_size` that dropping leaves, so that it is not done at every put."""

LATEST = sys.maxsize
"""Later than every time of use."""

ALL_ROWS = """
SELECT identity, key, checksum, value FROM entries
LEFT JOIN models ON models.id = entries.model LEFT JOIN contents ON contents.id = entries.id
"""
MISCOUNTED = """
SELECT identity FROM models WHERE rows <> (SELECT count(*) FROM entries WHERE model = models.id)
OR bytes <> (SELECT ifnull(sum(size), 0) FROM entries WHERE model = models.id)
"""


def default_path() -> Path:
    """Return where the store is unless the config says otherwise: in the user's cache."""
    return cache_dir() / "reference.sqlite3"


def row_key(prompt: Sequence[int], answer: Sequence[int]) -> bytes:
    """Return the 16-byte key of an answer after a prompt; where the prompt ends is part of it."""
    ids = array("q", prompt) + array("q", answer)
    if sys.byteorder == "big":
        ids.byteswap()
    return hashlib.blake2b(struct.pack("<q", len(prompt)) + ids.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class StoredModel:
    """What the store holds of one reference model.

    Args:
        identity: Its name in the store.
        description: What it is made of, for people.
        rows: How many values.
        bytes: Their size together, without the about 130 bytes that each takes beside itself.
        last_used: When a value was last read or added.
    """

    identity: str
    description: dict[str, Any]
    rows: int
    bytes: int
    last_used: datetime

    @property
    def versions(self) -> dict[str, str]:
        """The libraries that computed the values; empty where an earlier lora_exp did not store them."""
        found = self.description.get("versions")
        return found if isinstance(found, dict) else {}


class ReferenceStore:
    """The open store; use as a context.

    Args:
        path: The SQLite file; made, with its folders, where it is not there.
        max_size: What all values together may take, in bytes; the file takes about 130 bytes more for each.

    Raises:
        UserError: Here and in every method, if the file cannot be read or written, or is locked for too long.
    """

    def __init__(self, path: Path, max_size: int) -> None:
        self.max_size = max_size
        # What could not be written at once because another process was writing.
        self._used_entries: set[int] = set()
        self._used_models: set[str] = set()
        self._damaged_entries: set[int] = set()
        self._file = StoreFile(path, when_replaced=self._forget_marks)

    @property
    def path(self) -> Path:
        """The SQLite file, without links."""
        return self._file.path

    @property
    def note(self) -> str | None:
        """What became of a file that could not serve as the store, or None."""
        return self._file.note

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was put lies in it already."""
        with suppress(sqlite3.Error):
            self._write_marks()
        self._file.close()

    def get(self, identity: str, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the values that are there, each as it was put, and mark them as used now."""
        return self._file.mending(lambda: self._get(identity, keys))

    def _get(self, identity: str, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        with self._file.snapshot():
            for key in keys:
                row = self._file.db.execute(
                    "SELECT entries.id, checksum, value FROM entries LEFT JOIN contents ON contents.id = entries.id "
                    "WHERE model = (SELECT id FROM models WHERE identity = ?) AND key = ?",
                    (identity, key),
                ).fetchone()
                if row is None:
                    continue
                entry, checksum, value = row
                if _is_whole(key, value, checksum):
                    found[key] = value
                    self._used_entries.add(entry)
                else:
                    self._damaged_entries.add(entry)
        if found:
            self._used_models.add(identity)
        self._write_marks()
        return found

    def put(self, identity: str, description: Mapping[str, Any], values: Mapping[bytes, bytes]) -> None:
        """Add values, all or none of them; of a key that is there already the stored value stays.

        Args:
            identity: Who computed the values.
            description: What it is made of, for people; kept from the first put.
            values: The value of each key.
        """
        if values:
            self._file.mending(lambda: self._put(identity, description, values))
            self._file.mending(self._drop_excess)

    def _put(self, identity: str, description: Mapping[str, Any], values: Mapping[bytes, bytes]) -> None:
        text = json.dumps(dict(description), ensure_ascii=False, default=str)
        with self._file.transaction():
            now = self._mark()
            self._file.db.execute(
                "INSERT INTO models (identity, description, used) VALUES (?, ?, ?) "
                "ON CONFLICT (identity) DO UPDATE SET used = excluded.used",
                (identity, text, now),
            )
            (model,) = self._file.db.execute("SELECT id FROM models WHERE identity = ?", (identity,)).fetchone()
            self._file.db.executemany(
                "INSERT INTO entries (model, key, size, used) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (model, key) DO UPDATE SET used = excluded.used",
                ((model, key, len(value), now) for key, value in values.items()),
            )
            self._file.db.executemany(
                "INSERT OR IGNORE INTO contents (id, checksum, value) "
                "SELECT id, ?, ? FROM entries WHERE model = ? AND key = ?",
                ((_checksum(key, value), value, model, key) for key, value in values.items()),
            )
        self._forget_marks()

    # Times of use, and what goes when the store is full.

    def _mark(self) -> int:
        """Write what is to be marked, inside a transaction, and return its time."""
        now = self._file.now()
        entries, models, damaged = sorted(self._used_entries), self._used_models, self._damaged_entries
        self._file.db.executemany("UPDATE entries SET used = ? WHERE id = ?", ((now, entry) for entry in entries))
        self._file.db.executemany("UPDATE models SET used = ? WHERE identity = ?", ((now, each) for each in models))
        self._file.db.executemany("DELETE FROM entries WHERE id = ?", ((entry,) for entry in damaged))
        return now

    def _write_marks(self) -> None:
        """Mark at once, or with the next write where another process is writing: reading waits for no one."""
        if not (self._used_entries or self._damaged_entries):
            return
        with suppress(sqlite3.OperationalError):
            with self._file.transaction(brief=True):
                self._mark()
            self._forget_marks()

    def _forget_marks(self) -> None:
        self._used_entries.clear()
        self._used_models.clear()
        self._damaged_entries.clear()

    def _drop_excess(self) -> None:
        """Drop what was used before this object was opened, oldest first; what is in use only if that is not enough."""
        if self._stored_bytes() <= self.max_size:
            return
        with self._file.transaction():
            for before in (self._file.opened, LATEST):
                if self._stored_bytes() > self.max_size:
                    self._drop_oldest(self._stored_bytes() - int(FILLED_AGAIN * self.max_size), before)
            self._file.db.execute("DELETE FROM models WHERE rows = 0")
        self._file.shrink()

    def _drop_oldest(self, size: int, before: int) -> None:
        gone = []
        query = "SELECT id, size FROM entries WHERE used < ? ORDER BY used, id"
        with closing(self._file.db.execute(query, (before,))) as oldest:
            while size > 0 and (row := oldest.fetchone()):
                gone.append(row[:1])
                size -= row[1]
        self._file.db.executemany("DELETE FROM entries WHERE id = ?", gone)

    def _stored_bytes(self) -> int:
        (total,) = self._file.db.execute("SELECT ifnull(sum(bytes), 0) FROM models").fetchone()
        return int(total)

    def file_digest(self, path: Path) -> str:
        """Return the sha256 of a file, as `digests.file_digest` does, remembered in this store."""
        return file_digest(self._file, path)

    # For people.

    def summary(self) -> list[StoredModel]:
        """Return what is stored of each model, the last used one first."""
        query = "SELECT identity, description, rows, bytes, used FROM models ORDER BY used DESC"
        rows = self._file.mending(lambda: self._file.db.execute(query).fetchall())
        return [
            StoredModel(identity, _description(text), number, size, datetime.fromtimestamp(used / 1e9, UTC))
            for identity, text, number, size, used in rows
        ]

    def check(self) -> list[str]:
        """Read everything, change nothing, and return what is wrong."""
        problems: list[str] = []
        try:
            with self._file.snapshot():
                for problem in self._problems():
                    problems.append(problem)
        except sqlite3.OperationalError as error:
            raise refusal(self.path, error) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            problems.append(f"the file cannot be read further: {error}")
        return problems

    def _problems(self) -> Iterator[str]:
        for (line,) in self._file.db.execute("PRAGMA integrity_check"):
            if line != "ok":
                yield str(line)
        for identity, key, checksum, value in self._file.db.execute(ALL_ROWS):
            if not _is_whole(key, value, checksum):
                shown = key.hex() if isinstance(key, bytes) else repr(key)
                yield f"row {shown} of {identity} is not what was stored; it counts as absent"
        for (identity,) in self._file.db.execute(MISCOUNTED):
            yield f"the rows of {identity} are miscounted"

    def clear(self, identity: str | None) -> int:
        """Remove the values of one model, or of all, and return how many there were.

        Args:
            identity: An identity or the beginning of one; None for everything, remembered digests too.

        Raises:
            UserError: If no identity begins so, or several do.
        """
        removed = self._file.mending(lambda: self._clear(identity))
        self._file.mending(self._file.shrink)
        return removed

    def _clear(self, identity: str | None) -> int:
        with self._file.transaction():
            models = self._find(identity)
            if identity is None:
                self._file.db.execute("DELETE FROM files")
            removed = 0
            for (model,) in models:
                removed += self._file.db.execute("DELETE FROM entries WHERE model = ?", (model,)).rowcount
                self._file.db.execute("DELETE FROM models WHERE id = ?", (model,))
        return removed

    def _find(self, beginning: str | None) -> list[tuple[int]]:
        if beginning is None:
            return self._file.db.execute("SELECT id FROM models").fetchall()
        exact = self._file.db.execute("SELECT id FROM models WHERE identity = ?", (beginning,)).fetchall()
        query = "SELECT id FROM models WHERE substr(identity, 1, ?) = ?"
        found = exact or self._file.db.execute(query, (len(beginning), beginning)).fetchall()
        if len(found) == 1 and beginning:  # an empty one is a shell's unset variable, not a choice
            return found
        what = f"{len(found)} identities begin so" if found else f"no identity in {self.path} begins so"
        mend = "`python -m lora_exp.store list` shows them"
        raise UserError("there is no telling what to clear", [Problem(f"identity {beginning!r}", what, mend)])


def _checksum(key: bytes, value: bytes) -> bytes:
    """Return what a value is stored with, so that a change of either is seen."""
    return hashlib.blake2b(b"".join((struct.pack("<q", len(key)), key, value)), digest_size=8).digest()


def _is_whole(key: Any, value: Any, checksum: Any) -> bool:
    """Tell whether a row is what was put: in a damaged file everything can be anything."""
    return isinstance(key, bytes) and isinstance(value, bytes) and _checksum(key, value) == checksum


def _description(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
