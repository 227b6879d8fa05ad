"""Threads of the CPU: how many compute.

The count comes from the config, the run that goes on, the environment and the cores, never from the load: another count
gives other bits. What follows the load is how long idle threads spin (`spin.py`).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Literal

from lora_exp.errors import count
from lora_exp.process.spin import own_setting, watches

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of this process's control group (version 2): microseconds of CPU time, or `max`, and the period they are for."""


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
    """Return what idle threads do, to end the line with; nothing where that is not known."""
    if setting := own_setting():
        return f"; idle ones wait by {setting}"
    return "; idle ones spin only while cores are free" if watches() else ""
