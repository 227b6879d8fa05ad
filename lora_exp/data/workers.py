"""Processes that check blocks beside this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from lora_exp.data.files import Unreadable


@contextmanager
def workers(number: int) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of processes that have imported no more than they need.

    They are started anew rather than forked: torch or a tracker may run threads in this process.

    Raises:
        Unreadable: If the system ends one of them, or does not let it start.
    """
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=_begin)
    try:
        yield pool
    except (BrokenProcessPool, OSError) as error:
        # CPython 3.11 ends the processes of a broken pool, and then waits for ever for one that was just being started.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        what = "was not checked to its end: the system has ended a process that checked it, or not let it start"
        raise Unreadable(what, "is the memory full?") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Leave Ctrl-C to the process that waits for the answers, and end when it does, however that may be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
