"""Whether a folder holds what was written into it: a manifest of checksums, written when all else is there.

A checkpoint is written beside its place and moved there once it is whole and on the disk, so that a kill at any moment
leaves the ones before it as they were. What happens to it later (a flipped bit, a cut file) the checksums tell.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from lora_exp.run_folder import UNFINISHED, to_json, write_whole

MANIFEST = "manifest.json"
PART = ".part"
"""Beside a folder's place, where it is written."""
REPLACED = ".replaced"
"""Where the one before it is kept until the new one has its place."""
BLOCK = 1 << 20


@contextmanager
def staged(place: Path, sealed: bool = True) -> Iterator[Path]:
    """Give a folder's name to write under; it takes its place when the block ends well, and is gone otherwise.

    Args:
        place: Where the folder goes; one that is there already is replaced.
        sealed: Whether it gets a manifest.
    """
    part = place.parent / PART / place.name
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        _to_disk_all(part)
        if sealed:
            seal(part)
        _move(part, place)
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)


def _move(part: Path, place: Path) -> None:
    kept = place.parent / REPLACED / place.name
    shutil.rmtree(kept, ignore_errors=True)
    if place.exists():
        kept.parent.mkdir(exist_ok=True)
        place.rename(kept)
    part.rename(place)
    shutil.rmtree(kept.parent, ignore_errors=True)
    _to_disk(place.parent)


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill left half-written in a folder, and put back what was to be replaced by it."""
    for file in folder.glob(f".*{UNFINISHED}"):
        file.unlink()
    shutil.rmtree(folder / PART, ignore_errors=True)
    for kept in (folder / REPLACED).glob("*"):
        if not (folder / kept.name).exists():
            kept.rename(folder / kept.name)
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write the sizes and checksums of a folder's files into its manifest."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "xxh3_128": _checksum(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    write_whole(folder / MANIFEST, to_json({"files": files}) + "\n")
    _to_disk(folder)


def _to_disk_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _to_disk(path)


def damage(folder: Path) -> str | None:
    """Say what of a sealed folder is not as it was written; None where everything is."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        found = (_file_damage(folder / name, facts["bytes"], facts["xxh3_128"]) for name, facts in files.items())
        return next((each for each in found if each is not None), None)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never whole"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _file_damage(file: Path, size: int, checksum: str) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size:,} of {size:,} bytes"
    return None if _checksum(file) == checksum else f"{file.name} is not what was written"


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, where the file system can be told so."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)
