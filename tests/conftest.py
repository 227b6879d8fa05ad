"""What the tests share. No test asks the hub for anything, or fills the user's caches; fetched models are read."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

_hub_cache = tempfile.TemporaryDirectory(prefix="lora_exp-tests-")
# Read by huggingface_hub and datasets when they are first imported, so it stands before everything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _hub_cache.name
# Commands that tests start in other folders run this tree, whichever one is installed.
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
# Tables are as wide as without a terminal, whatever the developer's has: rich keeps the width it finds first.
os.environ.pop("COLUMNS", None)

from lora_exp.compose import Composer  # noqa: E402
from lora_exp.models.source import cache_dir  # noqa: E402
from lora_exp.resolvers import register_resolvers  # noqa: E402
from tests.forked import ForkServer  # noqa: E402

_cache = Path(_hub_cache.name) / "lora_exp"
_cache.mkdir()
if (cache_dir() / "models").is_dir():
    (_cache / "models").symlink_to((cache_dir() / "models").resolve())
os.environ["LORA_EXP_CACHE"] = str(_cache)

settings.register_profile("lora_exp", deadline=None, max_examples=40)
settings.load_profile("lora_exp")

HEAVY = ("torch", "transformers", "trl", "peft", "datasets")
"""Libraries that help, configs and errors answer without."""


@pytest.fixture(scope="session", autouse=True)
def _resolvers() -> None:
    register_resolvers()


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Return what starts commands that have their imports behind them."""
    server = ForkServer(tmp_path_factory.mktemp("home"))
    yield server
    server.close()


@pytest.fixture
def composer() -> Iterator[Composer]:
    """Compose from `conf/`, as the command line does."""
    with Composer() as composer:
        yield composer


@dataclass(frozen=True)
class Command:
    """What a command did: its exit status, what it printed, the CPU seconds it took and what it imported."""

    status: int
    stdout: str
    stderr: str
    cpu_seconds: float
    imported: frozenset[str]

    @property
    def heavy_imports(self) -> set[str]:
        return self.imported & set(HEAVY)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Command]:
    """Run `python -m lora_exp ...` in an empty folder."""

    def run(*arguments: str) -> Command:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "lora_exp", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "WANDB_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = done.stderr.splitlines()
        imports = [line for line in lines if line.startswith("import time:")]
        said = "\n".join(line for line in lines if not line.startswith("import time:"))
        names = {re.split(r"\s*\|\s*", line)[-1].strip() for line in imports}
        assert "hydra" in names, "the list of imports was not understood"
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Command(done.returncode, done.stdout, said, seconds, frozenset(names))

    return run


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[Any]], Path]:
    """Write rows as JSON Lines; a string stands in the file as it is."""

    def write(path: Path, rows: Iterable[Any]) -> Path:
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_bytes("".join(f"{line}\n" for line in lines).encode())
        return path

    return write


@pytest.fixture(scope="session")
def record() -> Callable[..., dict[str, Any]]:
    """Make a valid DataRecord; keyword arguments such as `inputs__question` replace a value."""

    def make(**changes: Any) -> dict[str, Any]:
        row: dict[str, Any] = {
            "id": "row-1",
            "schema_version": "1.0",
            "inputs": {"question": "Where is my parcel?", "context": "Left the depot at 8:00"},
            "outputs": {"answer": "On its way since eight."},
            "meta": {"source": "tests", "timestamp": "2026-01-05T08:11:00Z", "tags": ["parcel"]},
        }
        for path, value in changes.items():
            *sections, key = path.split("__")
            place = row
            for section in sections:
                place = place[section]
            place[key] = value
        return row

    return make


@pytest.fixture(scope="session")
def preference() -> Callable[..., dict[str, Any]]:
    """Make a valid preference row."""

    def make(**changes: Any) -> dict[str, Any]:
        return {"prompt": "Where is my parcel?", "chosen": "On its way.", "rejected": "No idea.", **changes}

    return make
