"""The run folder: every result of one run, each file whole or not there."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lora_exp.disk import writing
from lora_exp.errors import Interrupted, Problem, Pruned, UserError
from lora_exp.provenance import git_state, versions
from lora_exp.secrets.masking import masked

Status = Literal["running", "finished", "failed", "pruned"]

UNFINISHED = ".unfinished"
"""How the name of a file ends that is being written, hidden beside its place."""

RESERVE = ".reserve"
RESERVED_BYTES = 1 << 16
"""Kept while a run is at work, so that a disk that it fills has room for its last words."""


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old text or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{UNFINISHED}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def to_json(value: Any, indent: int | None = 2) -> str:
    """Return JSON that every parser reads: NaN and infinity become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file that was appended to; a last line that a kill has torn is left out."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]


class RunFolder:
    """One run's folder and its `run.json`.

    Use as a context: the status is `running` inside, `finished` after, `pruned` where the block raises that, and
    `failed`, with the error, where it raises anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self.wall_times: dict[str, float] = {}
        self.current_stage = ""
        self._noting = threading.RLock()

    @property
    def checkpoints(self) -> Path:
        """Where Trainer keeps what a resume needs."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Where the trained adapter goes."""
        return self.path / "adapter"

    @contextmanager
    def open(self, config: str, resumed: bool, **facts: Any) -> Iterator[RunFolder]:
        """Claim the folder for a run.

        Args:
            config: The resolved config as YAML.
            resumed: Whether the run goes on in a folder that holds one.
            facts: What `run.json` says from its first moment on.

        Raises:
            UserError: If the folder holds another run, or cannot be written.
        """
        self._claim(resumed)
        self._write("config.yaml", config)
        with writing("the run folder", self.path, self.path):
            (self.path / RESERVE).write_bytes(os.urandom(RESERVED_BYTES))
        self.note(
            status="running",
            **facts,
            objective=None,
            error=None,
            versions=versions(),
            git=git_state(),
            started=_now(),
        )
        try:
            yield self
        except Pruned as reason:
            self.note(status="pruned", pruned=str(reason), ended=_now())
            raise
        except Interrupted as error:
            self.end_as_failed(f"{error.what}; {error.mend}")
            raise
        except BaseException as error:
            self.end_as_failed(f"{type(error).__name__}: {error}")
            raise
        finally:
            (self.path / RESERVE).unlink(missing_ok=True)
        self.note(status="finished", ended=_now())

    def note(self, **facts: Any) -> None:
        """Put facts into `run.json`."""
        with self._noting:
            self.facts |= facts
            self.write_json("run.json", {**self.facts, "wall_times": self.wall_times})

    def end_as_failed(self, error: str) -> None:
        """Put into `run.json` why the run ends, also on a disk that it has filled."""
        with suppress(OSError):
            (self.path / RESERVE).unlink(missing_ok=True)
        with suppress(UserError, OSError):  # the error itself is on its way, and must not be lost over this
            self.note(status="failed", error=error, ended=_now())

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the folder, secrets masked."""
        self._write(name, to_json(masked(value)) + "\n")

    def write_jsonl(self, name: str, rows: list[Any]) -> None:
        """Write a JSON Lines file of the folder, secrets masked."""
        self._write(name, "".join(to_json(row, indent=None) + "\n" for row in masked(rows)))

    def _write(self, name: str, text: str) -> None:
        with writing(name, self.path / name, self.path):
            write_whole(self.path / name, text)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a part of the run into `wall_times`; where it raises, it stays the current one."""
        start, before, self.current_stage = time.perf_counter(), self.current_stage, name
        try:
            yield
            self.current_stage = before
        finally:
            self.wall_times[name] = round(self.wall_times.get(name, 0.0) + time.perf_counter() - start, 3)

    def _claim(self, resumed: bool) -> None:
        run_json = self.path / "run.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if problems := links_out(self.path):
                raise UserError("the run cannot start", problems)
            if not resumed and run_json.exists() and not holds_run(self.path):
                run_json.unlink()
            started = run_json.exists() or not (self.path / ".hydra").is_dir()
            with run_json.open("r" if resumed and started else "x"):
                pass
        except FileExistsError:
            if not self.path.is_dir():
                problem = Problem("output_dir", f"{self.path} is a file", "choose another folder")
                raise UserError("the run cannot start", [problem]) from None
            raise UserError("the run cannot start", [taken(self.path)]) from None
        except OSError as error:
            problem = Problem(str(run_json), f"cannot be opened: {error.strerror}", "choose another output_dir=...")
            raise UserError("the run cannot start", [problem]) from error


def holds_run(path: Path) -> bool:
    """Whether a folder holds a run that would be lost: any but one that failed before its first logged step."""
    run_json = path / "run.json"
    if not run_json.exists():
        return False
    if (path / "metrics.jsonl").exists() or (path / "checkpoints").exists():
        return True
    try:
        return bool(json.loads(run_json.read_text(encoding="utf-8")).get("status") != "failed")
    except json.JSONDecodeError:
        return True


OWN_FOLDERS = (".hydra", "adapter", "checkpoints")
"""Folders in which the run writes; a tracker's own may hold links to its caches."""


def links_out(path: Path) -> list[Problem]:
    """Return a problem for each link in a run folder that leads out of it: what the run writes would go elsewhere."""
    found = [*path.glob("*"), *(inner for name in OWN_FOLDERS for inner in (path / name).rglob("*"))]
    return [
        Problem(str(link), f"is a link that leads out of the run folder, to {link.resolve()}", "remove it first")
        for link in found
        if link.is_symlink() and not link.resolve().is_relative_to(path.resolve())
    ]


def taken(path: Path) -> Problem:
    """Return the problem of a folder that already holds a run."""
    return Problem("output_dir", f"{path} holds a run already", f"choose another folder, or go on with resume={path}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
