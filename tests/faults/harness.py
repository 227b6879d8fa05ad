"""Start runs, do them harm at a moment, and compare what is left with a run that was left alone."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.forked import Forked, ForkServer

TIMES = re.compile(r"runtime|per_second")
Moment = Callable[["Running"], bool]
"""Whether it has come, asked over and over."""


@dataclass
class Tally:
    """Faults by kind: how many were injected, and how many of them were survived."""

    injected: dict[str, int] = field(default_factory=dict)
    survived: dict[str, int] = field(default_factory=dict)

    def inject(self, kind: str, number: int = 1) -> None:
        self.injected[kind] = self.injected.get(kind, 0) + number

    def survive(self, kind: str, number: int = 1) -> None:
        self.survived[kind] = self.survived.get(kind, 0) + number

    def lines(self) -> Iterable[str]:
        yield f"{'fault':<44}{'injected':>10}{'survived':>10}{'lost':>6}"
        rows = {kind: (number, self.survived.get(kind, 0)) for kind, number in self.injected.items()}
        rows["all"] = (sum(self.injected.values()), sum(self.survived.values()))
        for kind, (injected, survived) in rows.items():
            yield f"{kind:<44}{injected:>10}{survived:>10}{injected - survived:>6}"


@dataclass
class Running:
    """A run at work, and the folder that it works in."""

    process: Forked
    folder: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def logged(self) -> int:
        file = self.folder / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    status: int
    said: str


class Server:
    """Runs commands one after the other, and does them harm."""

    def __init__(self, forks: ForkServer) -> None:
        self.forks = forks

    def run(
        self,
        *arguments: str,
        cwd: Path,
        folder: Path | None = None,
        harm: Mapping[str, Moment] | None = None,
        environment: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        ignored: Iterable[str] = (),
    ) -> Ended:
        """Run `python -m lora_exp`.

        Args:
            arguments: Of the command line.
            cwd: Where.
            folder: The run folder, for what watches it.
            harm: Signals to send, each when its moment comes, in this order.
            environment: Variables to set.
            limits: Limits of the process, by their names in `resource`.
            ignored: Signals that the process is started to ignore.
        """
        log = self.forks.home / f"log-{time.monotonic_ns()}"
        told = {"WANDB_MODE": "offline", "COLUMNS": "160", **(environment or {})}
        process = self.forks.start(
            *arguments, cwd=cwd, stdout=log, stderr=log, environment=told, limits=limits, ignored=ignored
        )
        try:
            self._harm(Running(process, folder or cwd), harm or {})
        except BaseException:  # a test that fails leaves nothing at work
            process.kill()
            raise
        status = process.wait()
        return Ended(status, log.read_text(errors="replace") if log.exists() else "")

    def _harm(self, running: Running, harm: Mapping[str, Moment]) -> None:
        for name, moment in harm.items():
            while not moment(running):
                if running.process.poll() is not None:
                    return
                time.sleep(0.0005)
            running.process.send_signal(getattr(signal, name.partition(" ")[0]))


def after(seconds: float) -> Moment:
    return lambda running: running.seconds > seconds


def later(moment: Moment, delay: float) -> Moment:
    """Return the moment that comes a while after another."""
    seen: list[float] = []

    def come(running: Running) -> bool:
        if not seen and moment(running):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= delay

    return come


def when_there(pattern: str, delay: float = 0.0) -> Moment:
    """Return the moment when a path below the run folder matches, and a while later."""
    return later(lambda running: any(True for _ in running.folder.glob(pattern)), delay)


def when_logged(lines: int) -> Moment:
    return lambda running: running.logged() >= lines


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if not TIMES.search(key)}
    return value


def outcome(folder: Path) -> dict[str, Any]:
    """Return what two runs must have in common to be the same: every number, and the adapter to the bit."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "status": json.loads((folder / "run.json").read_text())["status"],
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics.jsonl": [list(without_times(line).items()) for line in lines],
        "metrics.json": without_times(json.loads((folder / "metrics.json").read_text())),
        "samples.jsonl": (folder / "samples.jsonl").read_text(),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "leftovers": sorted(path.name for path in folder.iterdir() if path.name.startswith(".")),
    }


def started(folder: Path) -> bool:
    """Whether a run got as far as to say what it is; before that its command is simply given again."""
    saved = folder / ".hydra" / "overrides.yaml"
    return saved.is_file() and bool(saved.read_text().strip())
