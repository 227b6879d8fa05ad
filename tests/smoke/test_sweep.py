"""Named sweeps: killed at any moment and started again they end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.few import ROWS
from tests.forked import Forked, ForkServer

SWEEP = [
    "-m",
    "sweep.name=grid",
    "recipe=dpo",
    "recipe.beta=0.05,0.5",
    "sweep.seeds=2",
    "tracker=none",
    "samples.num_prompts=0",
    "trainer.max_steps=6",
    "trainer.save_strategy=steps",
    "trainer.save_steps=2",
    "trainer.eval_strategy=steps",
    "trainer.eval_steps=3",
    "trainer.learning_rate=1e-3",
    *ROWS,
]


Start = Callable[[Path], Forked]


@pytest.fixture(scope="module")
def start(fork_server: ForkServer) -> Start:
    def begin(cwd: Path) -> Forked:
        log = cwd / "log.txt"
        return fork_server.start(*SWEEP, cwd=cwd, stdout=log, stderr=log, environment={"HOME": str(cwd)})

    return begin


def worker_of(process: Forked) -> int:
    """Return the process that trains."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def trials(cwd: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(cwd.glob("multirun/grid/*/run.json"))}


def results(cwd: Path) -> dict[str, tuple[Any, ...]]:
    """Return what a sweep found, without what a clock says."""
    return {
        name: (
            facts(folder)["status"],
            facts(folder)["objective"],
            (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
            [
                {
                    key: value
                    for key, value in json.loads(line).items()
                    if "runtime" not in key and "per_second" not in key
                }
                for line in (folder / "metrics.jsonl").read_text().splitlines()
            ],
        )
        for name, folder in trials(cwd).items()
    }


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("whole")
    assert start(cwd).wait() == 0, (cwd / "log.txt").read_text()
    return cwd


def test_trials_are_named_for_what_they_vary(whole: Path) -> None:
    expected = [f"recipe.beta={beta},seed={seed}" for beta in ("0.05", "0.5") for seed in (42, 43)]
    assert list(trials(whole)) == expected


def test_killed_at_random_moments_it_ends_in_the_same_results(start: Start, whole: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    process = start(tmp_path)
    lines = tmp_path / "multirun/grid/recipe.beta=0.05,seed=42/metrics.jsonl"
    while not (lines.exists() and "train_runtime" in lines.read_text()):  # between the last step and the end of a run
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.002)
    process.kill()
    process.wait()
    for _ in range(5):
        process = start(tmp_path)
        try:
            assert process.wait(timeout=moments.uniform(0.2, 6)) == 0, (tmp_path / "log.txt").read_text()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert start(tmp_path).wait() == 0, (tmp_path / "log.txt").read_text()
    assert results(tmp_path) == results(whole)


def test_a_finished_trial_is_not_trained_again(start: Start, whole: Path) -> None:
    before = {name: (folder / "run.json").stat().st_mtime_ns for name, folder in trials(whole).items()}
    begin = time.monotonic()
    assert start(whole).wait() == 0
    assert time.monotonic() - begin < 10
    assert before == {name: (folder / "run.json").stat().st_mtime_ns for name, folder in trials(whole).items()}


def test_a_trial_that_is_killed_spares_the_rest(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path)
    first = tmp_path / "multirun/grid/recipe.beta=0.05,seed=42"
    while not (first / "checkpoints").exists():
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    os.kill(worker_of(process), signal.SIGKILL)
    assert process.wait() == 2
    found = trials(tmp_path)
    assert [facts(folder)["status"] for folder in found.values()] == ["failed", "finished", "finished", "finished"]
    assert "SIGKILL" in facts(first)["error"]
    assert start(tmp_path).wait() == 0
    assert facts(first)["status"] == "finished"


def test_nothing_runs_on_when_the_command_is_killed(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path)
    while not trials(tmp_path):
        time.sleep(0.05)
    worker = worker_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_another_question_under_the_same_name_is_refused(fork_server: ForkServer, whole: Path) -> None:
    before = trials(whole)
    done = fork_server.run(*SWEEP, "recipe.loss_type=ipo", cwd=whole)
    assert done.returncode == 2
    assert "recipe.loss_type: was 'sigmoid' in multirun/grid and is 'ipo' now" in done.stderr
    assert trials(whole) == before


def test_two_commands_cannot_run_one_sweep(fork_server: ForkServer, start: Start, tmp_path: Path) -> None:
    process = start(tmp_path)
    while not (tmp_path / "multirun/grid/sweep.json").exists():
        time.sleep(0.05)
    done = fork_server.run(*SWEEP, cwd=tmp_path)
    process.kill()
    assert done.returncode == 2
    assert "another command is running this sweep" in done.stderr
