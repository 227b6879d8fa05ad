"""The reference store: what a reference model says of token ids, kept across runs in one SQLite file.

A value depends on who computed it (the identity) and on the token ids (the key), and on nothing else; it is never
changed, only added and, where the store grows too large, dropped: what was not used for longest goes first.

The file may be read and written by several processes at once. Each may be killed at any moment: a transaction is in
the file whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sqlite3
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from lora_exp.errors import Problem, UserError
from lora_exp.models.source import cache_dir

T = TypeVar("T")

VERSION = 1
"""Of the tables below; a file with another one is moved aside."""

APPLICATION_ID = int.from_bytes(b"lora", "big")
"""Tells the store from other programs' databases, which are never moved."""

WAIT_S = 60.0
"""How long a write waits for other processes' writes."""

BRIEF_WAIT_S = 0.1
"""The same for writes that may be left out: times of use, remembered digests, giving pages back."""

FILLED_AGAIN = 0.9
"""The share of `max_size` that dropping leaves, so that it is not done at every put."""

LATEST = sys.maxsize
"""Later than every time of use."""

HASHED_EACH_TIME = 1 << 20
"""Files smaller than this are hashed faster than anything about them is worth remembering."""

RACY_NS = 2 * 10**9
"""A file that was changed this recently may change again within the same tick of its file system's clock."""

REMEMBERED_FILES = 1000
ATTEMPTS = 3
DAMAGE = ("no such table", "no such column", "unsupported file format")
"""What SQLite says of damaged files with the error class of refusals."""

PAGES_AT_ONCE = 10_000
HUB_BLOB = re.compile("[0-9a-f]{64}")

# Times of use change at every get, values never: they stand in tables of their own, so that marking ten thousand
# values as used writes some hundred KB and not the values once more. The triggers keep `rows` and `bytes` of a model
# right whoever adds or removes a row, inside the same transaction; the sum over all is then a handful of numbers.
TABLES = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE, description TEXT NOT NULL, used INTEGER NOT NULL,
    rows INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY, model INTEGER NOT NULL, key BLOB NOT NULL, size INTEGER NOT NULL, used INTEGER NOT NULL,
    UNIQUE (model, key)
);
CREATE INDEX entries_by_use ON entries (used);
CREATE TABLE contents (id INTEGER PRIMARY KEY, checksum BLOB NOT NULL, value BLOB NOT NULL);
CREATE TABLE files (
    path TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
    digest TEXT NOT NULL, remembered INTEGER NOT NULL
);
CREATE TRIGGER entry_added AFTER INSERT ON entries BEGIN
    UPDATE models SET rows = rows + 1, bytes = bytes + new.size WHERE id = new.model;
END;
CREATE TRIGGER entry_removed AFTER DELETE ON entries BEGIN
    DELETE FROM contents WHERE id = old.id;
    UPDATE models SET rows = rows - 1, bytes = bytes - old.size WHERE id = old.model;
END;
"""
NAMES = frozenset({"models", "entries", "entries_by_use", "contents", "files", "entry_added", "entry_removed"})

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


class _UnfitError(Exception):
    """There is no store in the file; `kind` names what stands in its way, and is empty where nothing does."""

    def __init__(self, kind: str = "", why: str = "") -> None:
        self.kind, self.why = kind, why
        super().__init__(why)


class ReferenceStore:
    """The open store; use as a context.

    Args:
        path: The SQLite file; made, with its folders, where it is not there.
        max_size: What all values together may take, in bytes; the file takes about 130 bytes more for each.

    Attributes:
        note: What became of a file that could not serve as the store, or None.

    Raises:
        UserError: Here and in every method, if the file cannot be read or written, or is locked for too long.
    """

    def __init__(self, path: Path, max_size: int) -> None:
        self.path = Path(os.path.realpath(path))  # SQLite puts its -wal beside the file that a link points to
        self.max_size = max_size
        self.note: str | None = None
        # What could not be written at once because another process was writing.
        self._used_entries: set[int] = set()
        self._used_models: set[str] = set()
        self._damaged_entries: set[int] = set()
        self._open()

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
        self._db.close()

    # Values.

    def get(self, identity: str, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the values that are there, each as it was put, and mark them as used now."""
        return self._mending(lambda: self._get(identity, keys))

    def _get(self, identity: str, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        with self._snapshot():
            for key in keys:
                row = self._db.execute(
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
            self._mending(lambda: self._put(identity, description, values))
            self._mending(self._drop_excess)

    def _put(self, identity: str, description: Mapping[str, Any], values: Mapping[bytes, bytes]) -> None:
        text = json.dumps(dict(description), ensure_ascii=False, default=str)
        with self._transaction():
            now = self._mark()
            self._db.execute(
                "INSERT INTO models (identity, description, used) VALUES (?, ?, ?) "
                "ON CONFLICT (identity) DO UPDATE SET used = excluded.used",
                (identity, text, now),
            )
            (model,) = self._db.execute("SELECT id FROM models WHERE identity = ?", (identity,)).fetchone()
            self._db.executemany(
                "INSERT INTO entries (model, key, size, used) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (model, key) DO UPDATE SET used = excluded.used",
                ((model, key, len(value), now) for key, value in values.items()),
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO contents (id, checksum, value) "
                "SELECT id, ?, ? FROM entries WHERE model = ? AND key = ?",
                ((_checksum(key, value), value, model, key) for key, value in values.items()),
            )
        self._forget_marks()

    # Times of use, and what goes when the store is full.

    def _now(self) -> int:
        """Return the time, but later than every stored one, so that a clock set back mixes up no order."""
        (latest,) = self._db.execute("SELECT max(used) FROM entries").fetchone()
        return max(time.time_ns(), (latest or 0) + 1)

    def _mark(self) -> int:
        """Write what is to be marked, inside a transaction, and return its time."""
        now = self._now()
        entries, models, damaged = sorted(self._used_entries), self._used_models, self._damaged_entries
        self._db.executemany("UPDATE entries SET used = ? WHERE id = ?", ((now, entry) for entry in entries))
        self._db.executemany("UPDATE models SET used = ? WHERE identity = ?", ((now, each) for each in models))
        self._db.executemany("DELETE FROM entries WHERE id = ?", ((entry,) for entry in damaged))
        return now

    def _write_marks(self) -> None:
        """Mark at once, or with the next write where another process is writing: reading waits for no one."""
        if not (self._used_entries or self._damaged_entries):
            return
        with suppress(sqlite3.OperationalError):
            with self._transaction(brief=True):
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
        with self._transaction():
            for before in (self._opened, LATEST):
                if self._stored_bytes() > self.max_size:
                    self._drop_oldest(self._stored_bytes() - int(FILLED_AGAIN * self.max_size), before)
            self._db.execute("DELETE FROM models WHERE rows = 0")
        self._shrink()

    def _drop_oldest(self, size: int, before: int) -> None:
        gone = []
        query = "SELECT id, size FROM entries WHERE used < ? ORDER BY used, id"
        with closing(self._db.execute(query, (before,))) as oldest:
            while size > 0 and (row := oldest.fetchone()):
                gone.append(row[:1])
                size -= row[1]
        self._db.executemany("DELETE FROM entries WHERE id = ?", gone)

    def _stored_bytes(self) -> int:
        (total,) = self._db.execute("SELECT ifnull(sum(bytes), 0) FROM models").fetchone()
        return int(total)

    def _shrink(self) -> None:
        """Give empty pages back to the file system; what another process prevents is done at the next time."""
        with suppress(sqlite3.OperationalError), self._patience(BRIEF_WAIT_S):
            (empty,) = self._db.execute("PRAGMA freelist_count").fetchone()
            # In parts, so that other processes get to write in between. Each step of the statement frees one page, and
            # `execute` takes a single step of a statement without columns; a script is run to its end.
            for _ in range(0, empty, PAGES_AT_ONCE):
                self._db.executescript(f"PRAGMA incremental_vacuum({PAGES_AT_ONCE})")
            # The file itself becomes shorter when the pages in the -wal go over into it.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    # Digests of files.

    def file_digest(self, path: Path) -> str:
        """Return the sha256 of a file, without reading it again while its size, time and inode are the same.

        Raises:
            OSError: If there is no such file, or it cannot be read.
        """
        real = Path(os.path.realpath(path))
        if real.parent.name == "blobs" and HUB_BLOB.fullmatch(real.name) and real.is_file():
            return real.name  # the hub's cache names large files so
        with real.open("rb") as file:
            state = _state(real, file)
            if state.size < HASHED_EACH_TIME:
                return _sha256(file)
            known = self._mending(lambda: self._known_digest(state))
            if known is not None:
                return known
            # A change within the clock's tick leaves size and time as they are; git calls such files racily clean.
            settled = time.time_ns() - state.mtime_ns >= RACY_NS
            digest = _sha256(file)
            settled = settled and _state(real, file) == state
        if settled:
            self._mending(lambda: self._remember(state, digest))
        return digest

    def _known_digest(self, state: _State) -> str | None:
        query = "SELECT digest FROM files WHERE path = ? AND size = ? AND mtime_ns = ? AND inode = ?"
        row = self._db.execute(query, (state.path, state.size, state.mtime_ns, state.inode)).fetchone()
        return None if row is None else str(row[0])

    def _remember(self, state: _State, digest: str) -> None:
        values = (state.path, state.size, state.mtime_ns, state.inode, digest, time.time_ns())
        with suppress(sqlite3.OperationalError), self._transaction(brief=True):
            self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", values)
            self._db.execute(
                "DELETE FROM files WHERE path NOT IN (SELECT path FROM files ORDER BY remembered DESC LIMIT ?)",
                (REMEMBERED_FILES,),
            )

    # For people.

    def summary(self) -> list[StoredModel]:
        """Return what is stored of each model, the last used one first."""
        query = "SELECT identity, description, rows, bytes, used FROM models ORDER BY used DESC"
        rows = self._mending(lambda: self._db.execute(query).fetchall())
        return [
            StoredModel(identity, _description(text), number, size, datetime.fromtimestamp(used / 1e9, timezone.utc))
            for identity, text, number, size, used in rows
        ]

    def check(self) -> list[str]:
        """Read everything, change nothing, and return what is wrong."""
        problems: list[str] = []
        try:
            with self._snapshot():
                for problem in self._problems():
                    problems.append(problem)
        except sqlite3.OperationalError as error:
            raise _refusal(self.path, error) from error
        except sqlite3.DatabaseError as error:
            problems.append(f"the file cannot be read further: {error}")
        return problems

    def _problems(self) -> Iterator[str]:
        for (line,) in self._db.execute("PRAGMA integrity_check"):
            if line != "ok":
                yield str(line)
        for identity, key, checksum, value in self._db.execute(ALL_ROWS):
            if not _is_whole(key, value, checksum):
                shown = key.hex() if isinstance(key, bytes) else repr(key)
                yield f"row {shown} of {identity} is not what was stored; it counts as absent"
        for (identity,) in self._db.execute(MISCOUNTED):
            yield f"the rows of {identity} are miscounted"

    def clear(self, identity: str | None) -> int:
        """Remove the values of one model, or of all, and return how many there were.

        Args:
            identity: An identity or the beginning of one; None for everything, remembered digests too.

        Raises:
            UserError: If no identity begins so, or several do.
        """
        removed = self._mending(lambda: self._clear(identity))
        self._mending(self._shrink)
        return removed

    def _clear(self, identity: str | None) -> int:
        with self._transaction():
            models = self._find(identity)
            if identity is None:
                self._db.execute("DELETE FROM files")
            removed = 0
            for (model,) in models:
                removed += self._db.execute("DELETE FROM entries WHERE model = ?", (model,)).rowcount
                self._db.execute("DELETE FROM models WHERE id = ?", (model,))
        return removed

    def _find(self, beginning: str | None) -> list[tuple[int]]:
        if beginning is None:
            return self._db.execute("SELECT id FROM models").fetchall()
        exact = self._db.execute("SELECT id FROM models WHERE identity = ?", (beginning,)).fetchall()
        query = "SELECT id FROM models WHERE substr(identity, 1, ?) = ?"
        found = exact or self._db.execute(query, (len(beginning), beginning)).fetchall()
        if len(found) == 1 and beginning:  # an empty one is a shell's unset variable, not a choice
            return found
        what = f"{len(found)} identities begin so" if found else f"no identity in {self.path} begins so"
        mend = "`python -m lora_exp.store list` shows them"
        raise UserError("there is no telling what to clear", [Problem(f"identity {beginning!r}", what, mend)])

    # The file.

    def _mending(self, work: Callable[[], T]) -> T:
        """Do something with the file; where it turns out to be damaged, do it with a new one."""
        for _ in range(ATTEMPTS):
            try:
                return work()
            except sqlite3.OperationalError as error:
                if not (_is_damage(error) or self._is_damaged(error)):
                    raise _refusal(self.path, error) from error
                why = str(error)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                why = str(error)
            self._replace_damaged(why)
        raise _refusal(self.path, "was damaged again and again")

    def _is_damaged(self, error: sqlite3.OperationalError) -> bool:
        """Tell whether it is the file that the system's refusal comes from: a wrong row number reads as a full disk."""
        if "locked" in str(error):
            return False
        try:
            return bool(self._db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",))
        except sqlite3.OperationalError:
            return False
        except sqlite3.DatabaseError:
            return True

    def _replace_damaged(self, why: str) -> None:
        self._forget_marks()  # they name rows of the damaged file
        try:
            with _alone(self.path):
                # Otherwise another process has seen the damage too, and what stands there now is its new store.
                if _file_id(self.path) == self._file_id:
                    self._db.close()
                    self._move_aside(_UnfitError("damaged", why))
        except OSError as error:
            raise _refusal(self.path, error) from error
        self._db.close()
        self._open()

    def _open(self) -> None:
        """Open the store; begin one where there is none or where something that is none stands in its place."""
        try:
            if self.path.parent.exists() and not self.path.parent.is_dir():
                raise _refusal(self.path, f"cannot be made: {self.path.parent} is no folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._connect()
            except _UnfitError:
                self._begin()
        except (OSError, sqlite3.OperationalError, _UnfitError) as error:
            raise _refusal(self.path, error) from error

    def _begin(self) -> None:
        with _alone(self.path):
            try:
                self._connect()  # another process may have begun one meanwhile
            except _UnfitError as unfit:
                if unfit.kind:
                    self._move_aside(unfit)
                _create(self.path)
                self._connect()

    def _connect(self) -> None:
        """Open the file if it is a sound store of this version, as far as a glance can tell."""
        try:
            self._connect_to_what_stands_there()
        except (UserError, sqlite3.OperationalError) as error:
            # Another process has moved it aside since it was looked at: no refusal, and the new one is behind the lock.
            if _file_id(self.path) != self._file_id:
                raise _UnfitError from error
            raise

    def _connect_to_what_stands_there(self) -> None:
        # Taken before the file is opened: if it is exchanged in between, the new one is at least not taken for damaged.
        self._file_id = _file_id(self.path)
        if self._file_id is None:
            raise _UnfitError
        # SQLite would open it for reading, and the first put would fail when the values are computed.
        if not (os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)):
            raise _refusal(self.path, "cannot be written")
        db = _connection(self.path)
        try:
            _look_at(db, self.path)
            # With the write-ahead log, NORMAL means: a killed process loses nothing that it has committed, and a
            # computer that loses power may lose the last commits but not the file, since the log is synced before
            # pages go over from it. Lost values are computed again; a sync at every commit would buy nothing.
            db.execute("PRAGMA synchronous = NORMAL")
            self._db = db
            self._opened = self._now()
        except BaseException as error:
            db.close()
            if isinstance(error, sqlite3.DatabaseError) and _is_damage(error):
                raise _UnfitError("damaged", str(error)) from error
            raise

    def _move_aside(self, unfit: _UnfitError) -> None:
        names = (f"{self.path.name}.{unfit.kind}-{number}" for number in range(1, sys.maxsize))
        aside = next(path for path in map(self.path.with_name, names) if not path.exists())
        # The database first: a process that comes along in between finds none, and then waits for the lock.
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                _beside(self.path, suffix).rename(_beside(aside, suffix))
        sentence = f"{self.path} {unfit.why}" if unfit.kind != "damaged" else f"{self.path} is damaged ({unfit.why})"
        sentence += f", so it was renamed to {aside.name} and a new store begun."
        self.note = f"{self.note} {sentence}" if self.note else sentence

    @contextmanager
    def _patience(self, wait_s: float) -> Iterator[None]:
        """Wait for other processes' writes no longer than this."""
        self._db.execute(f"PRAGMA busy_timeout = {int(1000 * wait_s)}")
        try:
            yield
        finally:
            self._db.execute(f"PRAGMA busy_timeout = {int(1000 * WAIT_S)}")

    @contextmanager
    def _transaction(self, brief: bool = False) -> Iterator[None]:
        """Write all of what the block writes, or nothing."""
        with self._patience(BRIEF_WAIT_S if brief else WAIT_S):
            # IMMEDIATE waits for the lock here; a transaction that reads first and then writes could not wait.
            self._db.execute("BEGIN IMMEDIATE")
        yield from self._block()

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Read one state of the file, whatever others write meanwhile."""
        self._db.execute("BEGIN")
        yield from self._block()

    def _block(self) -> Iterator[None]:
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # after some errors SQLite has done it already
                self._db.execute("ROLLBACK")
            raise


@dataclass(frozen=True)
class _State:
    """What tells that a file has not been changed."""

    path: str
    size: int
    mtime_ns: int
    inode: int


def _state(path: Path, file: BinaryIO) -> _State:
    found = os.fstat(file.fileno())
    return _State(str(path), found.st_size, found.st_mtime_ns, found.st_ino)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


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


def _connection(path: Path) -> sqlite3.Connection:
    """Open a file that is there; isolation_level=None leaves the transactions to this module."""
    db = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=WAIT_S, isolation_level=None)
    db.text_factory = lambda text: text.decode(errors="replace")  # a damaged text is no exception
    return db


def _look_at(db: sqlite3.Connection, path: Path) -> None:
    """Raise `_UnfitError`, or what SQLite says, unless the file is a store of this version."""
    names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if not names:
        raise _UnfitError
    if application != APPLICATION_ID and not names >= NAMES:
        raise _refusal(path, "is a database of another program")
    if version != VERSION:
        raise _UnfitError("other-version", f"has layout {version} of another version of lora_exp, not {VERSION}")
    if not names >= NAMES:
        raise _UnfitError("damaged", f"it lacks {', '.join(sorted(NAMES - names))}")


def _create(path: Path) -> None:
    """Make an empty store beside the path and put it there whole."""
    scratch = path.with_name(f".{path.name}.new")
    for suffix in ("", "-wal", "-shm", "-journal"):
        _beside(scratch, suffix).unlink(missing_ok=True)  # of a process that was killed here
    with closing(sqlite3.connect(scratch, isolation_level=None)) as db:
        # Both have to come before the first table. A value of some hundred tokens fills pages of 4 KiB badly.
        db.execute("PRAGMA page_size = 8192")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL").fetchall()
        db.executescript(
            f"BEGIN; {TABLES} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}; COMMIT;"
        )
    for suffix in ("-wal", "-shm"):
        _beside(path, suffix).unlink(missing_ok=True)  # without their database; a new one would take them for its own
    scratch.replace(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let only one process at a time begin a store or move one aside; a killed one lets go of the lock."""
    # The empty file stays: who deletes a lock file takes it away from those who wait for it.
    with _beside(path, ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _file_id(path: Path) -> tuple[int, int] | None:
    """Tell a file from another one that takes its name; None if there is none, or nothing in it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if found.st_size else None


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Tell a damaged file from what the system refuses and from mistakes, which are subclasses."""
    return type(error) is sqlite3.DatabaseError or any(sign in str(error) for sign in DAMAGE)


def _refusal(path: Path, reason: Exception | str) -> UserError:
    text = reason.strerror or str(reason) if isinstance(reason, OSError) else str(reason)
    if "locked" in text:
        text = f"has been locked by another process for {WAIT_S:g} s"
    elif not isinstance(reason, str):
        text = f"cannot be used: {text}"
    mend = "store.path=<file> names another one, in a folder that can be written"
    return UserError("the reference store cannot be used", [Problem("store.path", f"{path} {text}", mend)])
