"""The demo's sweep, killed twenty times at random moments, ends in the same leaderboard, bit for bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 20
DEMO = ["-m", "experiment=demo_sweep", "sweep.name=demo"]


def start(cwd: Path) -> subprocess.Popen[bytes]:
    with (cwd / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "lora_exp", *DEMO],
            cwd=cwd,
            env={**os.environ, "HOME": str(cwd)},
            stdout=log,
            stderr=log,
        )


@pytest.mark.slow
def test_twenty_kills_leave_no_trace_in_the_leaderboard(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert start(whole).wait() == 0, (whole / "log.txt").read_text()
    moments, kills = random.Random(0), 0
    for _ in range(KILLS):
        process = start(killed)
        try:
            assert process.wait(timeout=moments.uniform(0.5, 9)) == 0, (killed / "log.txt").read_text()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert start(killed).wait() == 0, (killed / "log.txt").read_text()
    assert kills > KILLS / 2
    for name in ("leaderboard.csv", "leaderboard.json"):
        assert (killed / "multirun/demo" / name).read_bytes() == (whole / "multirun/demo" / name).read_bytes()
