"""The memory allocator of a process: mimalloc instead of the C library's, where it can be had.

torch asks a processor's memory for blocks at multiples of 64 bytes. glibc (2.36) looks for such a block in a hole 96
bytes larger, so the place of a freed tensor never fits the next one of its size: of 100 such places 7 were used again.
A training step then walks through fresh memory, out of every cache, and the heap grows to half as much again.
mimalloc puts the block into the place that was freed last (benchmarks/NOTES.md has what it gave).

An allocator must be there before a process asks for its first byte, so the process starts itself anew.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

LIBRARY = Path("cmeel.prefix", "lib", "libmimalloc.so")
"""Where the package cmeel-mimalloc has it, from the folder that packages are installed in."""

SYSTEM = "system"
CHOICE = "LORA_EXP_ALLOCATOR"
"""The environment variable that leaves the C library's allocator in place if it is `system`."""

PRELOADED = "LD_PRELOAD"
"""What Linux's loader reads (man 8 ld.so). Whoever sets it has chosen for himself."""

SETTINGS = {
    "MIMALLOC_PURGE_DELAY": "3600000",  # milliseconds until freed memory goes back to the system: not within a step
    "MIMALLOC_ALLOW_THP": "0",  # huge pages were slower: the system has to clear them
}


def restart_with_mimalloc() -> None:
    """Start this process anew with mimalloc; return where that has happened, or cannot be, or is not wanted."""
    library = _library()
    if library is None:
        return
    if os.environ.get(PRELOADED) == str(library):
        for name in (PRELOADED, *SETTINGS):  # not for the programs that this one starts
            os.environ.pop(name, None)
        return
    environment = {**os.environ, **SETTINGS, PRELOADED: str(library)}
    os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606 -- itself


def _library() -> Path | None:
    """Return the library to start with, if any."""
    if sys.platform != "linux" or os.environ.get(CHOICE) == SYSTEM:
        return None
    found = Path(sysconfig.get_path("purelib")) / LIBRARY
    chosen = os.environ.get(PRELOADED)
    return found if found.is_file() and chosen in (None, str(found)) and _loads(found) else None


def _loads(library: Path) -> bool:
    """Whether all is there that the library needs, libatomic say: otherwise no process starts with it."""
    import ctypes

    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def allocator_name() -> str:
    """Return `mimalloc` if this process runs on it, else `system`."""
    import ctypes

    return "mimalloc" if hasattr(ctypes.CDLL(None), "mi_version") else SYSTEM


def collect() -> bool:
    """Give what mimalloc keeps back to the system; False where this process runs on another allocator."""
    import ctypes

    try:
        ctypes.CDLL(None).mi_collect(True)
    except AttributeError:
        return False
    return True
