"""What a disk refuses: told with the place and the mend, by whichever library it was written with."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_exp.errors import Problem, UserError

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file would be larger than the system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "it may not be written",
    errno.EPERM: "it may not be written",
    errno.EIO: "the disk failed",
}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
NO_NUMBER = ("PytorchStreamWriter", "unexpected pos", "iostream", "I/O error", "os error")
"""In what torch and safetensors raise where a write fails; they keep the system's error number to themselves."""

PROBE = 1 << 20
LEAST_FREE = 1 << 20
"""Bytes without which no run needs to begin."""


@contextmanager
def writing(what: str, place: Path, run: Path) -> Iterator[None]:
    """Turn what a disk refuses into an error with its mend; everything else passes as it is.

    Args:
        what: What is written, as in `the checkpoint`.
        place: Where.
        run: The run's folder.

    Raises:
        UserError: If the disk is full, or cannot be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = refusal(error, run)
        if reason is None:
            raise
        room = f"make room ({_free(run)} free there), then go on" if "full" in reason else "then go on"
        problem = Problem(str(place), reason, f"{room} with resume={run}, or with the sweep's command again")
        raise UserError(f"{what} could not be written, so the run stops", [problem]) from error


@contextmanager
def room_for_files(run: Path) -> Iterator[None]:
    """Tell of a disk without room wherever a run meets it: a library's cache, a folder for temporary files.

    Args:
        run: The run's folder.

    Raises:
        UserError: If a disk has no room.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = refusal(error, run)
        if reason is None or reason not in [REASONS[number] for number in NO_ROOM]:
            raise
        named = error.filename if isinstance(error, OSError) else None
        place = named or f"{run}, {tempfile.gettempdir()} or a cache folder"
        problem = Problem(str(place), reason, f"make room, then go on with resume={run}")
        raise UserError("a file could not be written, so the run stops", [problem]) from error


def refusal(error: BaseException, folder: Path) -> str | None:
    """Return why the disk refused a write, or None where the error is of another kind.

    Args:
        error: What was raised.
        folder: Where it was written, to ask the disk again where the error does not say.
    """
    if isinstance(error, OSError):
        return REASONS.get(error.errno or 0)
    if not any(mark in str(error) for mark in NO_NUMBER):
        return None
    probe = folder / f".probe.{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refused:
        return REASONS.get(refused.errno or 0)
    finally:
        with suppress(OSError):
            probe.unlink()
    return next((text for number, text in REASONS.items() if os.strerror(number) in str(error)), None)


def unwritable(folder: Path) -> Problem | None:
    """Return why nothing can be written to a folder that may not be there yet; None where it can."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return Problem("output_dir", f"{place} is a file", "choose another output_dir=...")
    if not os.access(place, os.W_OK | os.X_OK):
        return Problem("output_dir", f"{place} cannot be written", "choose another output_dir=...")
    if shutil.disk_usage(place).free < LEAST_FREE:
        return Problem("output_dir", f"the disk of {place} is full ({_free(place)} free)", "make room there")
    return None


def _free(folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    return f"{free / 2**20:,.1f} MiB" if free >= 2**20 else f"{free / 2**10:,.0f} KiB"
