"""Threads of the CPU: how many compute, and how long an idle one spins before it sleeps.

The count comes from the config, the run that goes on, the environment and the cores, never from the load: another count
gives other bits. The load shows in how long idle threads spin. OpenMP's threads wait for the next parallel region in a
loop, GNU OpenMP's for 300,000 rounds (3 ms and more), and hold a core that the thread they wait for needs where other
processes work too (benchmarks/THREADS.md has what that costs). The spin changes no bits.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Literal

from lora_exp.errors import count

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of this process's control group (version 2): microseconds of CPU time, or `max`, and the period they are for."""

SPINS = 2_000
"""Rounds of GNU OpenMP's loop. Fewer cost time on an idle machine, more beside busy processes."""

BLOCK_TIME = 1
"""Milliseconds: the shortest time but 0, which is no spin at all, that every version of LLVM's OpenMP reads."""

SPIN = {"GOMP_SPINCOUNT": str(SPINS), "KMP_BLOCKTIME": str(BLOCK_TIME)}
"""How long idle threads spin, for each OpenMP by its own variable; it reads it as it is loaded, with torch.

torch's wheels bring GNU OpenMP on Linux, LLVM's on macOS and Intel's on Windows; conda's may bring LLVM's on Linux.
Only GNU OpenMP was measured: KMP_BLOCKTIME never ran. Its default is 200 ms.
"""

WAIT_POLICY = "OMP_WAIT_POLICY"
"""The standard's own variable, from which each OpenMP takes how long to spin; only a user sets it."""


def limit_spin() -> None:
    """Set how long idle threads spin, for this process and its children; what the user has set stays.

    Call it before torch is imported.
    """
    if os.environ.get(WAIT_POLICY):
        return
    for name, value in SPIN.items():
        os.environ.setdefault(name, value)


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity and its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def recorded_threads(folder: Path) -> int | None:
    """Return how many threads a run computed with, by its `run.json`; None where that does not say so."""
    try:
        threads = json.loads((folder / "run.json").read_text(encoding="utf-8"))["device"]["threads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return threads if type(threads) is int and threads > 0 else None


def use_threads(wanted: int | Literal["auto"], recorded: int | None = None) -> str:
    """Set torch's threads and return how many, why, and what idle ones do.

    Args:
        wanted: The config's `engine.num_threads`.
        recorded: The count of the run that goes on or is reproduced; stands for `auto`, before OMP_NUM_THREADS.
    """
    import torch

    threads, reason = _choose(wanted, recorded)
    torch.set_num_threads(threads)
    return f"{count(threads, 'thread')}: {reason}" + (_idle() if threads > 1 else "")


def _choose(wanted: int | Literal["auto"], recorded: int | None) -> tuple[int, str]:
    if wanted != "auto":
        return wanted, f"engine.num_threads={wanted}"
    if recorded is not None:
        return recorded, "as the run began"
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a number for each level of nesting
    if given.isdecimal() and int(given) > 0:
        return int(given), "OMP_NUM_THREADS"
    return usable_cores(), "the cores that this process may use"


def _idle() -> str:
    """Return what idle threads do, to end the line with; nothing where neither this project nor the user set it."""
    own = "GOMP_SPINCOUNT" if sys.platform == "linux" else "KMP_BLOCKTIME"
    name = next((each for each in (own, WAIT_POLICY) if os.environ.get(each)), None)
    if name is None:
        return ""
    if os.environ[name] != SPIN.get(name):
        return f"; idle ones wait by {name}={os.environ[name]}"
    return f"; idle ones sleep after {f'{SPINS:,} spins' if name == 'GOMP_SPINCOUNT' else f'{BLOCK_TIME} ms'}"
