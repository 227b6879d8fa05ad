"""Commands in processes of their own that have everything imported already: forks of `tests.fork_server`.

For what a command does once it is at work. What it takes to get there is tested by commands that are started as a
user starts them (`smoke/test_commands.py`, `conftest.command`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Forked:
    """A command at work, with the methods of `subprocess.Popen`."""

    arguments: tuple[str, ...]
    pid: int
    status: Path

    def poll(self) -> int | None:
        return int(self.status.read_text()) if self.status.exists() else None

    def wait(self, timeout: float = 180) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it may have just ended
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts commands, several at a time if asked to."""

    def __init__(self, home: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        self.home = home
        self._orders = 0
        self._turn = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=REPOSITORY,
            # glibc reserves 64 MiB of addresses for each thread that happens to need an arena of its own: with one
            # arena a limit of the address space means the same in every run.
            env={**environment, "HOME": str(home), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def start(
        self,
        *arguments: str,
        cwd: Path,
        stdout: Path,
        stderr: Path,
        environment: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        ignored: Iterable[str] = (),
    ) -> Forked:
        """Start `python -m lora_exp`.

        Args:
            arguments: Of the command line.
            cwd: Where.
            stdout: The file that it writes to the end of.
            stderr: The same for its complaints; may be the same file.
            environment: Variables to set, beside those of the tests but W&B's.
            limits: Limits of the process, by their names in `resource`.
            ignored: Signals that the process is started to ignore.
        """
        assert self._process.stdin is not None
        with self._turn:
            self._orders += 1
            status = self.home / f"status-{self._orders}"
            order = {
                "arguments": arguments,
                "cwd": str(cwd),
                "stdout": str(stdout),
                "stderr": str(stderr),
                "status": str(status),
                "environment": {"HOME": str(self.home), **(environment or {})},
                "limits": limits or {},
                "ignored": list(ignored),
            }
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return Forked(arguments, int(self._answer()), status)

    def run(self, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m lora_exp` to its end, in a home of its own: the folder that it works in."""
        texts = [self.home / f"{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        code = self.start(
            *arguments, cwd=cwd, stdout=texts[0], stderr=texts[1], environment={"HOME": str(cwd), **environment}
        ).wait()
        said = [text.read_text(encoding="utf-8", errors="replace") for text in texts]
        return subprocess.CompletedProcess(arguments, code, *said)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return str(json.loads(self._process.stdout.readline()))
