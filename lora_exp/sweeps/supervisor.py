"""A multirun works in a process of its own: a trial that the system kills, out of memory say, spares the rest."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from lora_exp.run_folder import to_json, write_whole

FORWARDED = ("SIGTERM", "SIGUSR1", "SIGHUP")
"""Signals that mean the work, sent to the process that was started."""

began = time.time()
"""When this command was started; a worker inherits it."""

lost: dict[Path, str] = {}
"""Trials whose process was killed since this command was started, and how; they are not tried again."""


def supervise(folder: Path) -> None:
    """Return in a new process that does the work; the one that was started waits for it here, and ends with it.

    Where the worker is killed in a trial, that trial is marked as failed and a new worker goes on with the rest.

    Args:
        folder: The sweep's.
    """
    if not hasattr(os, "fork"):  # Windows: the trials run here, and a kill ends the sweep, to be started again
        return
    while True:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        worker = os.fork()
        if worker == 0:
            _end_with(parent)
            return
        code, asked = _wait(worker)
        if code >= 0:
            sys.exit(code)
        killed = mark_killed(folder, -code)
        if asked or not killed:
            sys.exit(128 - code)
        lost.update(killed)


def mark_killed(folder: Path, number: int) -> dict[Path, str]:
    """Mark the trials that were running as failed and return them with the reason.

    Args:
        folder: The sweep's.
        number: The signal's.
    """
    name = signal.Signals(number).name
    reason = f"killed by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")
    found = {}
    for run_json in folder.glob("*/run.json"):
        text = run_json.read_text(encoding="utf-8")
        facts = json.loads(text) if text.strip() else {"status": "running"}
        if facts["status"] == "running":
            write_whole(run_json, to_json({**facts, "status": "failed", "error": reason}) + "\n")
            found[run_json.parent.resolve()] = reason
    return found


def _wait(worker: int) -> tuple[int, bool]:
    """Return the worker's exit status, negative for a signal, and whether it was asked to end."""
    asked = False

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal asked
        asked = True
        os.kill(worker, number)

    # From a terminal Ctrl-C reaches the worker by itself; the second one must not be doubled either.
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    handlers = {name: forward for name in FORWARDED if hasattr(signal, name)}
    before = {name: signal.signal(getattr(signal, name), handler) for name, handler in handlers.items()}
    before["SIGINT"] = signal.signal(signal.SIGINT, signal.SIG_IGN if at_terminal else forward)
    try:
        _, status = os.waitpid(worker, 0)
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
    return os.waitstatus_to_exitcode(status), asked


def _end_with(parent: int) -> None:
    """Have the system kill this process when its parent is killed, so that a sweep never runs on unseen (Linux)."""
    import ctypes

    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, sys/prctl.h
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
