"""W&B after a kill: one run, every line once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from tests.faults.harness import Server, Tally, when_logged, without_times
from tests.faults.test_kills import COMMON, RUNS
from tests.wandb_server import StoredRun, WandbServer

TRACKED = [*COMMON, *RUNS["sft"], "tracker=wandb"]


def lines(folder: Path) -> list[dict[str, object]]:
    """Return what the run folder says that W&B must have."""
    return [without_times(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(run: StoredRun) -> list[dict[str, object]]:
    """Return the same from W&B's history: the step, and every number under its own name."""
    found = []
    for row in run.rows:
        if "train/global_step" in row and "samples" not in row:
            names = {key: key.replace("eval/", "eval_").removeprefix("train/") for key in row}
            line = {names[key]: value for key, value in row.items()}
            found.append(without_times({"step": line.pop("global_step"), **line}))
    return found


def same(run: StoredRun, folder: Path) -> None:
    expected = [{key: value for key, value in line.items() if isinstance(value, int | float)} for line in lines(folder)]
    assert told(run) == expected
    assert run.state == "finished"


@pytest.mark.parametrize("mode", [pytest.param("online", marks=pytest.mark.faults), "offline"])
def test_a_killed_run_goes_on_as_one_run_at_wandb(
    server: Server, tally: Tally, random: Random, tmp_path: Path, mode: str
) -> None:
    with WandbServer() as wandb:
        told_to = {**wandb.environment, "WANDB_MODE": mode, "HOME": str(tmp_path)}
        folder, when = tmp_path / "run", when_logged(random.randint(5, 9))
        harm = {"SIGKILL": when}
        ended = server.run(*TRACKED, "output_dir=run", cwd=tmp_path, folder=folder, harm=harm, environment=told_to)
        assert ended.status == -9, ended.said
        tally.inject(f"killed with W&B {mode}")
        ended = server.run("resume=run", cwd=tmp_path, folder=folder, environment=told_to)
        assert ended.status == 0, ended.said
        if mode == "offline":
            records = list((folder / "wandb").glob("offline-run-*"))
            assert len(records) == 1
            command = [sys.executable, "-m", "wandb", "sync", str(records[0])]
            subprocess.run(command, env=told_to, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        assert len(wandb.runs) == 1, ended.said
        (run,) = wandb.runs.values()
        same(run, folder)
        assert not wandb.not_understood
    tally.survive(f"killed with W&B {mode}")


@pytest.mark.faults
def test_a_tracker_that_hangs_costs_seconds(server: Server, tally: Tally, tmp_path: Path) -> None:
    with WandbServer(after_start="silent") as wandb:
        told_to = {**wandb.environment, "WANDB_MODE": "online", "HOME": str(tmp_path), "WANDB_HTTP_TIMEOUT": "2"}
        began = time.monotonic()
        waits = ["tracker.init_timeout=5", "tracker.finish_timeout=3"]
        ended = server.run(*TRACKED, *waits, "output_dir=run", cwd=tmp_path, environment=told_to)
        tally.inject("tracker that hangs")
        assert ended.status == 0, ended.said
        assert "wandb failed" in ended.said
        assert "wandb sync" in ended.said, "what brings the rest later"
        assert time.monotonic() - began < 120, "the run itself takes seconds"
    tally.survive("tracker that hangs")
