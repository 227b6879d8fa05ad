"""Digests of files, remembered in the reference store's file so that weights are not read at every run."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lora_exp.engine.store_file import StoreFile

HASHED_EACH_TIME = 1 << 20
"""Files smaller than this are hashed faster than anything about them is worth remembering."""

RACY_NS = 2 * 10**9
"""A file that was changed this recently may change again within the same tick of its file system's clock."""

REMEMBERED_FILES = 1000
HUB_BLOB = re.compile("[0-9a-f]{64}")


def file_digest(store: StoreFile, path: Path) -> str:
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
        known = store.mending(lambda: _known(store, state))
        if known is not None:
            return known
        # A change within the clock's tick leaves size and time as they are; git calls such files racily clean.
        settled = time.time_ns() - state.mtime_ns >= RACY_NS
        digest = _sha256(file)
        settled = settled and _state(real, file) == state
    if settled:
        store.mending(lambda: _remember(store, state, digest))
    return digest


def _known(store: StoreFile, state: _State) -> str | None:
    query = "SELECT digest FROM files WHERE path = ? AND size = ? AND mtime_ns = ? AND inode = ?"
    row = store.db.execute(query, (state.path, state.size, state.mtime_ns, state.inode)).fetchone()
    return None if row is None else str(row[0])


def _remember(store: StoreFile, state: _State, digest: str) -> None:
    values = (state.path, state.size, state.mtime_ns, state.inode, digest, time.time_ns())
    with suppress(sqlite3.OperationalError), store.transaction(brief=True):
        store.db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", values)
        store.db.execute(
            "DELETE FROM files WHERE path NOT IN (SELECT path FROM files ORDER BY remembered DESC LIMIT ?)",
            (REMEMBERED_FILES,),
        )


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
