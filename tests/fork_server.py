"""Runs commands in forks of a process that has imported everything: a run begins at once, and dies as any process.

Reads one JSON object a line, as `forked.ForkServer.start` writes it, and answers with the command's process id. A
process between the two waits for the command and leaves its status in a file, as subprocess has it (negative: the
signal that killed it), so that several may run at a time.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

IMPORTS_WANDB = ("lora_exp.recipes.trl", "lora_exp.training.callbacks")


def preload() -> None:
    """Import what a run would, and compute nothing: threads do not survive a fork.

    W&B is left to each command, with what imports it: it makes a folder when it is imported, and the first process that
    ends removes it.
    """
    from lora_exp.quiet import import_quietly, quiet_libraries

    quiet_libraries()
    import lora_exp.__main__
    import lora_exp.run  # noqa: F401
    from lora_exp.libraries import LIBRARIES

    for name in LIBRARIES:
        if name not in IMPORTS_WANDB:
            import_quietly(name)
    assert "wandb" not in sys.modules
    gc.collect()
    gc.freeze()  # a command that looks for garbage would copy all of it, page by page


def command(order: dict[str, Any]) -> None:
    """Be `python -m lora_exp`."""
    from lora_exp.__main__ import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
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


def wait_for(pid: int, status: Path) -> None:
    _, code = os.waitpid(pid, 0)
    part = status.with_suffix(".part")
    part.write_text(str(os.waitstatus_to_exitcode(code)))
    part.replace(status)


def serve() -> None:
    preload()
    _answer("ready")
    for line in sys.stdin:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who waits for a command is not waited for
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
        order = json.loads(line)
        pid = os.fork()
        if pid:
            _answer(pid)
            wait_for(pid, Path(order["status"]))
            os._exit(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        command(order)
        sys.exit(0)


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve()
