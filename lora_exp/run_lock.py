"""One run in a folder at a time: a lock that the system frees when the process ends, however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lora_exp.errors import Problem, UserError

LOCK = ".lock"

_held: dict[Path, FileLock] = {}
"""Taken by the command line, before Hydra writes to the folder; the run takes it over."""


def hold(folder: Path) -> None:
    """Lock a run folder for the run that this process is about to start in it.

    Raises:
        UserError: If a run is at work there.
    """
    _held[folder.resolve()] = _lock(folder)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; it is made where there is none.

    Raises:
        UserError: If a run is at work there, or the folder cannot be written.
    """
    lock = _held.pop(folder.resolve(), None) or _lock(folder)
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        problem = Problem("output_dir", f"a run is at work in {folder}", "wait for its end, or choose another folder")
        raise UserError("the run cannot start", [problem]) from None
    except FileExistsError:
        problem = Problem("output_dir", f"{folder} is a file", "choose another folder")
        raise UserError("the run cannot start", [problem]) from None
    except OSError as error:
        problem = Problem("output_dir", f"{folder} cannot be written: {error.strerror}", "choose another folder")
        raise UserError("the run cannot start", [problem]) from error
    return lock
