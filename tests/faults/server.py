"""Runs commands in forks of a process that has imported everything: a run begins at once, and dies as any process.

Reads one JSON object a line, as `harness.Server.run` writes it, and answers with the child's `pid`, then with its
`status` as subprocess has it (negative: the signal that killed it).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any


def preload() -> None:
    """Import what a run would, and compute nothing: threads do not survive a fork."""
    from lora_exp.quiet import quiet_libraries

    quiet_libraries()
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
    import trl  # noqa: F401

    import lora_exp.__main__
    import lora_exp.engine.training
    import lora_exp.recipes.trl
    import lora_exp.run
    import lora_exp.training.loop  # noqa: F401


def child(order: dict[str, Any]) -> None:
    from lora_exp.__main__ import main

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(order["cwd"])
    os.environ.update(order["environment"])
    for name, limit in order["limits"].items():
        if name == "RLIMIT_AS":  # of what the libraries have taken already, most of it never used
            limit += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, name), (limit, limit))
    for name in order["ignored"]:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.argv = ["lora_exp", *order["arguments"]]
    main()


def serve() -> None:
    preload()
    _answer("ready")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            child(json.loads(line))
            sys.exit(0)
        _answer({"pid": pid})
        _, status = os.waitpid(pid, 0)
        _answer({"status": os.waitstatus_to_exitcode(status)})


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve()
