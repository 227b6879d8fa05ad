"""Results of reading and tokenising, kept between runs by what they were made of.

An entry is a folder that is there whole or not at all: it is written beside and renamed. Its checksums are read before
it is used; a damaged one is removed, and made again by whoever asked.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from lora_exp.models.source import cache_dir
from lora_exp.provenance import versions

FACTS = "entry.json"
ALSO = ("jinja2", "pyarrow", "pydantic", "tokenizers")
"""What entries depend on, beside the packages that `run.json` names."""

DRAFT = "draft-"
DRAFT_SECONDS = 24 * 3600
"""A draft this old was left by a process that was killed."""


@dataclass(frozen=True)
class Entry:
    """What is kept under a key.

    Args:
        folder: Where its files are.
        facts: What was written down with them.
    """

    folder: Path
    facts: dict[str, Any]


class Cache:
    """The folder of all entries.

    Args:
        folder: Where; made when something is kept.
        max_size: What all entries together may take, in bytes; 0 keeps nothing and finds nothing.
    """

    def __init__(self, folder: Path, max_size: int) -> None:
        self.folder, self.max_size = folder, max_size
        self.failures: list[str] = []
        """Why something could not be kept; the run goes on without."""

    def find(self, key: str) -> Entry | None:
        """Return the entry of a key, whose files are as they were written, and mark it as used now."""
        folder = self.folder / key
        if not self.max_size or not os.path.isdir(folder):  # noqa: PTH112 - `is_dir` raises where it may not look
            return None
        try:
            written = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            sound = written["files"] == {name: _checksum(folder / name) for name in written["files"]}
            facts = dict(written["facts"])
        except (OSError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            self._remove(folder)
            return None
        with suppress(OSError):  # read-only: it is not known as used then
            os.utime(folder / FACTS)
        return Entry(folder, facts)

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Give a folder to write an entry into; it is removed at the end unless it was kept.

        Where the cache keeps nothing or cannot be written, the folder is among the system's temporary files.
        """
        folder = self._new_folder()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _new_folder(self) -> Path:
        if self.max_size:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                return Path(tempfile.mkdtemp(prefix=DRAFT, dir=self.folder))
            except OSError as error:
                self.failed(error)
        return Path(tempfile.mkdtemp(prefix="lora_exp-"))

    def keep(self, draft: Path, key: str, facts: dict[str, Any]) -> None:
        """Make a draft the entry of a key, and drop those not used for longest where all are too large."""
        if draft.parent != self.folder:
            return
        try:
            files = {each.name: _checksum(each) for each in sorted(draft.iterdir())}
            if sum(size for size, _ in files.values()) > self.max_size:
                return
            (draft / FACTS).write_text(json.dumps({"facts": facts, "files": files}), encoding="utf-8")
            for name in [*files, FACTS]:
                _flush(draft / name)
            with suppress(OSError):  # another process has just kept the same
                draft.rename(self.folder / key)
            self._shrink(spare=key)
        except OSError as error:
            self.failed(error)

    def failed(self, error: OSError) -> None:
        """Note that something could not be kept."""
        self.failures = [f"rows and token ids are not kept for the next run: {self.folder}: {error.strerror or error}"]

    def _shrink(self, spare: str) -> None:
        entries = []
        for folder in self.folder.iterdir():
            with suppress(OSError):  # another process may be removing it
                if folder.name.startswith(DRAFT):
                    if folder.stat().st_mtime < time.time() - DRAFT_SECONDS:
                        shutil.rmtree(folder, ignore_errors=True)
                    continue
                size = sum(each.stat().st_size for each in folder.iterdir())
                used = (folder / FACTS).stat().st_mtime
                entries.append((folder.name == spare, used, size, folder))
        excess = sum(size for _, _, size, _ in entries) - self.max_size
        for spared, _, size, folder in sorted(entries, key=lambda entry: entry[:2]):
            if excess <= 0 or spared:
                return
            self._remove(folder)
            excess -= size

    def _remove(self, folder: Path) -> None:
        """Take an entry away at once: a reader finds all of it or nothing; open files stay readable."""
        with suppress(OSError):
            aside = Path(tempfile.mkdtemp(prefix=DRAFT, dir=self.folder))
            folder.rename(aside / "removed")
            shutil.rmtree(aside, ignore_errors=True)


NO_CACHE = Cache(Path(), 0)
"""Keeps nothing."""


def data_cache(max_size: int) -> Cache:
    """Return the cache in the user's cache folder."""
    return Cache(cache_dir() / "data", max_size)


def key_of(name: str, **parts: Any) -> str:
    """Return the name of an entry that is made of these parts by the code and the libraries of now."""
    libraries = versions() | {package: version(package) for package in ALSO}
    text = json.dumps([parts, libraries, _code()], sort_keys=True, default=repr)
    return f"{name}-{xxh3_128(text.encode()).hexdigest()}"


@lru_cache(maxsize=1)
def _code() -> str:
    """Return a digest of this room, so that no entry is older than the code that would make it."""
    digest = xxh3_128()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return a digest of a file's bytes; 10 GB/s from memory."""
    digest = xxh3_128()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _checksum(path: Path) -> list[Any]:
    return [path.stat().st_size, file_digest(path)]


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
