"""Runs commands in forks of a process that has imported everything: a run begins at once, and dies as any process.

Reads one JSON object a line, as `forked.ForkServer.start` writes it, and answers with the command's process id. A
process between the two waits for the command and leaves its status in a file, as subprocess has it (negative: the
signal that killed it), so that several may run at a time.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn


def preload() -> None:
    """Import what a run would, and compute nothing: threads do not survive a fork."""
    from lora_exp.quiet import quiet_libraries

    quiet_libraries()
    import lora_exp.__main__
    import lora_exp.run  # noqa: F401
    from lora_exp.compose import Composer
    from lora_exp.libraries import load_libraries
    from lora_exp.resolvers import register_resolvers

    load_libraries()
    register_resolvers()
    with Composer() as composer:  # Hydra looks for plugins once, and its parser learns
        composer.compose(["recipe=dpo", "recipe.beta=0.1"], check_values=True)


def own_wandb_folder() -> None:
    """Give this process the folder that W&B makes when it is imported: the first process that ends removes it."""
    from wandb.sdk.data_types._private import MEDIA_TMP

    MEDIA_TMP._finalizer.detach()
    MEDIA_TMP.__init__("wandb-media")


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
    own_wandb_folder()
    sys.argv = ["lora_exp", *order["arguments"]]
    main()


def status_of(order: dict[str, Any]) -> int:
    """Run a command and return the status with which it ends; what else it raises ends this process."""
    try:
        command(order)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)  # noqa: T201 - as Python does
            return 1
        return end.code or 0
    return 0


def leave_with(status: int) -> NoReturn:
    """End as Python does, but without taking the libraries apart: a fork would copy all of their memory for it."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
        leave_with(status_of(order))


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve()
