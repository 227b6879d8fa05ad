"""Two runs in one folder: the second is refused, and a dead one keeps nothing locked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from lora_exp.errors import UserError
from lora_exp.run_lock import LOCK, hold, only_run
from tests.faults.harness import Tally
from tests.forked import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from lora_exp.run_lock import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_exp", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("arguments", [["output_dir=run"], ["resume=run"]])
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(
    tally: Tally, tmp_path: Path, arguments: list[str]
) -> None:
    overrides = tmp_path / "run" / ".hydra" / "overrides.yaml"
    overrides.parent.mkdir(parents=True)
    overrides.write_text("[]\n")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        tally.inject("second run in a folder")
        refused = command(*arguments, "tracker=none", cwd=tmp_path)
        assert refused.returncode == 2
        assert "a run is at work in run" in refused.stderr
        assert overrides.read_text() == "[]\n", "Hydra must not have written to it"
        tally.survive("second run in a folder")
        first.kill()
    tally.inject("lock of a dead run")
    bad = command(
        *arguments,
        "tracker=none",
        "data=splits",
        "data.train_file=missing.jsonl",
        "data.val_file=missing.jsonl",
        cwd=tmp_path,
    )
    assert "at work" not in bad.stderr
    assert "missing.jsonl: there is no such file" in bad.stderr, "it got as far as the data"
    tally.survive("lock of a dead run")


def test_the_command_line_hands_its_lock_to_the_run(tmp_path: Path) -> None:
    hold(tmp_path)
    with only_run(tmp_path), pytest.raises(UserError, match="at work"), only_run(tmp_path):
        pass
    with FileLock(tmp_path / LOCK, timeout=0):
        pass
