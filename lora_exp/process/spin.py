"""How long idle threads spin: long while cores are free, briefly while other processes wait for them.

An idle thread of GNU OpenMP, which torch's wheels bring on Linux, spins 300,000 rounds (3 ms) before it sleeps. On free
cores that is fastest. Beside busy processes it holds a core that the thread it waits for needs, and a step takes
several times as long (benchmarks/THREADS.md). Where a process has more OpenMP threads than cores, GNU OpenMP spins 100
rounds (libgomp's manual, GOMP_SPINCOUNT). So a thread watches how long this process waits for cores, and holds idle
teams of OpenMP while it waits much. The threads that compute stay the same, and so do the bits.

Other OpenMP libraries (macOS, Windows, some of conda's) have no such limit: there a team changes nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TASKS = Path("/proc/self/task")
"""Linux: a folder for each thread of this process."""

OWN_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables by which a user says how long idle threads spin; they win."""

INTERVAL_S = 0.1
CROWDED, FREE = 0.2, 0.1
"""Seconds that the threads of this process wait for a core in each second: from the first on teams are held, below the
second one, for `CALM` intervals, they go."""
CALM = 10

GRAIN = 32768
"""Numbers that torch gives a thread at least (`at::internal::GRAIN_SIZE`)."""


def own_setting() -> str | None:
    """Return the variable by which the user says how long idle threads spin, with its value."""
    return next((f"{name}={os.environ[name]}" for name in OWN_SETTINGS if os.environ.get(name)), None)


def watches() -> bool:
    """Whether the spin of this process follows the load: on Linux, unless the user has set it."""
    return sys.platform == "linux" and own_setting() is None and waited_s() is not None


def waited_s() -> float | None:
    """Return for how long the threads of this process have waited for a core so far; None where nobody counts it."""
    total = 0
    for task in TASKS.glob("*/schedstat"):
        with suppress(OSError):  # a thread that has ended
            total += int(task.read_text(encoding="ascii").split()[1])  # nanoseconds (Linux, sched-stats.rst)
    return total / 1e9 if total else None


@contextmanager
def brief_spins_beside_others() -> Iterator[None]:
    """Let idle threads spin briefly while other processes wait for the cores, within the block."""
    if not watches():
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), name="spin", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(ended: threading.Event) -> None:
    load, teams = Load(), Teams()
    try:
        while not ended.wait(INTERVAL_S):
            if load.is_crowded():
                teams.form()
            else:
                teams.dismiss()
    finally:
        teams.dismiss()


class Load:
    """Says whether other processes want the cores of this one, from how long its threads wait for them."""

    def __init__(self) -> None:
        self.before = time.monotonic(), waited_s() or 0.0
        self.crowded, self.calm = False, 0

    def is_crowded(self) -> bool:
        """Return it for the time since the last call."""
        now, waited = time.monotonic(), waited_s() or 0.0
        share = (waited - self.before[1]) / max(now - self.before[0], 1e-3)
        self.before = now, waited
        self.calm = self.calm + 1 if share < FREE else 0
        self.crowded = share > CROWDED or (self.crowded and self.calm < CALM)
        return self.crowded


class Teams:
    """Idle teams of OpenMP: enough that this process has more of its threads than cores."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.threads: list[threading.Thread] = []

    def form(self) -> None:
        """Form them, unless they are there."""
        import torch

        size = torch.get_num_threads()
        if self.threads or size < 2:
            return
        self.ended = threading.Event()
        number = max(0, len(os.sched_getaffinity(0)) - size) // (size - 1) + 1
        self.threads = [threading.Thread(target=_hold, args=(size, self.ended), daemon=True) for _ in range(number)]
        for thread in self.threads:
            thread.start()

    def dismiss(self) -> None:
        """Let them go: OpenMP ends a team with the thread that formed it."""
        self.ended.set()
        for thread in self.threads:
            thread.join()
        self.threads = []


def _hold(size: int, ended: threading.Event) -> None:
    import torch

    torch.ones(GRAIN * size).add_(1)  # a parallel region: from now on this thread has a team
    ended.wait()
