"""The SQLite file of the reference store: its tables, how it is opened, locked, and replaced where it is damaged.

The file may be read and written by several processes at once. Each may be killed at any moment: a transaction is in
the file whole or not at all.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from lora_exp.errors import Problem, UserError

T = TypeVar("T")

VERSION = 1
"""Of the tables below; a file with another one is moved aside."""

APPLICATION_ID = int.from_bytes(b"lora", "big")
"""Tells the store from other programs' databases, which are never moved."""

WAIT_S = 60.0
"""How long a write waits for other processes' writes."""

BRIEF_WAIT_S = 0.1
"""The same for writes that may be left out: times of use, remembered digests, giving pages back."""

ATTEMPTS = 3
DAMAGE = ("no such table", "no such column", "unsupported file format")
"""What SQLite says of damaged files with the error class of refusals."""

PAGES_AT_ONCE = 10_000

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


class _UnfitError(Exception):
    """There is no store in the file; `kind` names what stands in its way, and is empty where nothing does."""

    def __init__(self, kind: str = "", why: str = "") -> None:
        self.kind, self.why = kind, why
        super().__init__(why)


class StoreFile:
    """The open file.

    Args:
        path: Where it is; made, with its folders, where it is not there.
        when_replaced: Called before a new file takes a damaged one's place: row numbers then mean nothing any more.

    Attributes:
        db: The connection; another one after `mending`, so not to be kept.
        opened: The time when it was opened, by `now`.
        note: What became of a file that could not serve as the store, or None.

    Raises:
        UserError: Here and in `mending`, if the file cannot be read or written, or is locked for too long.
    """

    def __init__(self, path: Path, when_replaced: Callable[[], None]) -> None:
        self.path = Path(os.path.realpath(path))  # SQLite puts its -wal beside the file that a link points to
        self.note: str | None = None
        self._when_replaced = when_replaced
        self._open()

    def close(self) -> None:
        """Close it; what was committed lies in it already."""
        self.db.close()

    def now(self) -> int:
        """Return the time, but later than every stored one, so that a clock set back mixes up no order."""
        (latest,) = self.db.execute("SELECT max(used) FROM entries").fetchone()
        return max(time.time_ns(), (latest or 0) + 1)

    def mending(self, work: Callable[[], T]) -> T:
        """Do something with the file; where it turns out to be damaged, do it with a new one."""
        for _ in range(ATTEMPTS):
            try:
                return work()
            except sqlite3.OperationalError as error:
                if not (_is_damage(error) or self._is_damaged(error)):
                    raise refusal(self.path, error) from error
                why = str(error)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                why = str(error)
            except UnicodeDecodeError as error:  # a damaged name in SQLite's own sentence, or a mistake of the work
                if not self._is_damaged(error):
                    raise
                why = str(error)
            self._replace_damaged(why)
        raise refusal(self.path, "was damaged again and again")

    def _is_damaged(self, error: Exception) -> bool:
        """Tell whether it is the file that an error comes from: a wrong row number reads as a full disk."""
        if "locked" in str(error):
            return False
        try:
            if self.db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                return True
            # It reads no names; bytes that are no text come as the mark for them (`_connection`).
            statements = self.db.execute("SELECT name || coalesce(sql, '') FROM sqlite_master")
            return any("\ufffd" in statement for (statement,) in statements)
        except sqlite3.OperationalError:
            return False
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            return True

    @contextmanager
    def transaction(self, brief: bool = False) -> Iterator[None]:
        """Write all of what the block writes, or nothing."""
        with self._patience(BRIEF_WAIT_S if brief else WAIT_S):
            # IMMEDIATE waits for the lock here; a transaction that reads first and then writes could not wait.
            self.db.execute("BEGIN IMMEDIATE")
        yield from self._block()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read one state of the file, whatever others write meanwhile."""
        self.db.execute("BEGIN")
        yield from self._block()

    def _block(self) -> Iterator[None]:
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # after some errors SQLite has done it already
                self.db.execute("ROLLBACK")
            raise

    @contextmanager
    def _patience(self, wait_s: float) -> Iterator[None]:
        """Wait for other processes' writes no longer than this."""
        self.db.execute(f"PRAGMA busy_timeout = {int(1000 * wait_s)}")
        try:
            yield
        finally:
            self.db.execute(f"PRAGMA busy_timeout = {int(1000 * WAIT_S)}")

    def shrink(self) -> None:
        """Give empty pages back to the file system; what another process prevents is done at the next time."""
        with suppress(sqlite3.OperationalError), self._patience(BRIEF_WAIT_S):
            (empty,) = self.db.execute("PRAGMA freelist_count").fetchone()
            # In parts, so that other processes get to write in between. Each step of the statement frees one page, and
            # `execute` takes a single step of a statement without columns; a script is run to its end.
            for _ in range(0, empty, PAGES_AT_ONCE):
                self.db.executescript(f"PRAGMA incremental_vacuum({PAGES_AT_ONCE})")
            # The file itself becomes shorter when the pages in the -wal go over into it.
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _open(self) -> None:
        """Open the store; begin one where there is none or where something that is none stands in its place."""
        try:
            if self.path.parent.exists() and not self.path.parent.is_dir():
                raise refusal(self.path, f"cannot be made: {self.path.parent} is no folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._connect()
            except _UnfitError:
                self._begin()
        except (OSError, sqlite3.OperationalError, _UnfitError) as error:
            raise refusal(self.path, error) from error

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
            raise refusal(self.path, "cannot be written")
        db = _connection(self.path)
        try:
            _look_at(db, self.path)
            # With the write-ahead log, NORMAL means: a killed process loses nothing that it has committed, and a
            # computer that loses power may lose the last commits but not the file, since the log is synced before
            # pages go over from it. Lost values are computed again; a sync at every commit would buy nothing.
            db.execute("PRAGMA synchronous = NORMAL")
            self.db = db
            self.opened = self.now()
        except BaseException as error:
            db.close()
            if _is_damage(error):
                raise _UnfitError("damaged", str(error)) from error
            raise

    def _replace_damaged(self, why: str) -> None:
        self._when_replaced()
        try:
            with _alone(self.path):
                # Otherwise another process has seen the damage too, and what stands there now is its new store.
                if _file_id(self.path) == self._file_id:
                    self.db.close()
                    self._move_aside(_UnfitError("damaged", why))
        except OSError as error:
            raise refusal(self.path, error) from error
        self.db.close()
        self._open()

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
        raise refusal(path, "is a database of another program")
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


def _is_damage(error: BaseException) -> bool:
    """Tell a damaged file from what the system refuses and from mistakes, which are subclasses."""
    if isinstance(error, UnicodeDecodeError):  # a damaged name, in the sentence that would tell of it
        return True
    signs = isinstance(error, sqlite3.DatabaseError) and any(sign in str(error) for sign in DAMAGE)
    return signs or type(error) is sqlite3.DatabaseError


def refusal(path: Path, reason: Exception | str) -> UserError:
    """Return the error that tells the user why the file cannot be used, and the mend."""
    text = reason.strerror or str(reason) if isinstance(reason, OSError) else str(reason)
    if "locked" in text:
        text = f"has been locked by another process for {WAIT_S:g} s"
    elif not isinstance(reason, str):
        text = f"cannot be used: {text}"
    mend = "store.path=<file> names another one, in a folder that can be written"
    return UserError("the reference store cannot be used", [Problem("store.path", f"{path} {text}", mend)])
