"""The commands that the README shows run as written, from a clone and from an installed wheel.

Those of `python -m lora_exp` have their imports behind them; the wheel's is a process as a user starts it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

from tests.forked import ForkServer
from tests.runs import Finished

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.startswith("python -m lora_exp")
]
REAL_MODEL = [command for command in COMMANDS if "smollm2" in command]
QUICK = [command for command in COMMANDS if command not in REAL_MODEL]
SHORT = ["trainer.max_steps=1", "samples.num_prompts=0", "tracker=none"]
SFT = ("recipe=sft", "trainer.max_steps=1", "samples.num_prompts=0")


def run(command: str, cwd: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = command.split()
    assert words[:2] == ["python", "-m"]
    return subprocess.run(
        [sys.executable, "-m", *words[2:], *more],
        cwd=cwd,
        env={**os.environ, "WANDB_MODE": "offline", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def own_rows(folder: Path) -> None:
    """Write the files that the commands name as the user's."""
    sample = Path(str(files("lora_exp.data").joinpath("sample")))
    shutil.copytree(sample, folder / "my_rows")
    shutil.copy(sample / "val.dpo.jsonl", folder / "other.jsonl")


@pytest.fixture
def folder(tmp_path: Path, finished: Finished) -> Path:
    """A folder with what the commands name: rows of one's own, other.jsonl, and a finished run."""
    own_rows(tmp_path)
    shutil.copytree(finished(*SFT).folder, tmp_path / "outputs" / "run")
    (tmp_path / "outputs" / "run" / ".hydra").mkdir()
    overrides = "".join(f"- {each}\n" for each in (*SFT, "tracker=none"))
    (tmp_path / "outputs" / "run" / ".hydra" / "overrides.yaml").write_text(overrides)
    return tmp_path


@pytest.mark.parametrize("command", QUICK)
def test_a_command_of_the_readme_runs(command: str, folder: Path, fork_server: ForkServer) -> None:
    command = re.sub(r"outputs/<[^>]*>", "outputs/run", command)
    module, *words = command.split()[2:]
    if module == "lora_exp":
        more = SHORT if "--" not in command else []
        more = ["trainer.max_steps=2"] if "resume=" in command else more
        done = fork_server.run(*words, *more, cwd=folder, WANDB_MODE="offline")
    else:
        done = run(command, folder)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", REAL_MODEL)
def test_a_command_on_a_real_model_runs(command: str, folder: Path) -> None:
    fetch = command.startswith("python -m lora_exp.fetch")
    done = run(command, folder, *([] if fetch else ["trainer.max_steps=1", "trainer.per_device_train_batch_size=2"]))
    assert done.returncode == 0, done.stderr


def test_the_readme_shows_enough_commands_and_is_short() -> None:
    assert len(QUICK) >= 8
    assert len(REAL_MODEL) >= 3
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_wheel_composes_and_trains_in_another_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("lora_exp-*.whl")
    site, cwd = tmp_path / "site", tmp_path / "elsewhere"
    cwd.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = run("python -m lora_exp", cwd, *SHORT, "output_dir=here", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads((cwd / "here" / "run.json").read_text())["status"] == "finished"
    shown = run("python -m lora_exp --help", cwd, PYTHONPATH=str(site)).stdout
    assert str(site) in shown, "the configs of the wheel, not of the clone"


def test_a_run_that_was_killed_goes_on_with_resume_alone(fork_server: ForkServer, tmp_path: Path) -> None:
    schedule = [
        "trainer.max_steps=40",
        "trainer.save_strategy=steps",
        "trainer.save_steps=2",
        "trainer.eval_strategy=no",
    ]
    more = ["tracker=none", "samples.num_prompts=0", "recipe.max_length=128", "trainer.logging_steps=1"]
    log = tmp_path / "log"
    process = fork_server.start("output_dir=run", *schedule, *more, cwd=tmp_path, stdout=log, stderr=log)
    checkpoints = tmp_path / "run" / "checkpoints"
    while process.poll() is None and not (checkpoints / "checkpoint-4" / "trainer_state.json").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "run" / "adapter").exists(), (
        "it must be killed before its end for this test to mean anything"
    )

    refused = fork_server.run("output_dir=run", cwd=tmp_path, WANDB_MODE="offline")
    assert refused.returncode == 2
    assert "go on with resume=run" in refused.stderr

    done = fork_server.run("resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert facts["status"] == "finished"
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, 41))


def test_a_run_with_configs_of_ones_own_goes_on_with_resume_alone(fork_server: ForkServer, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    ours = "# @package _global_\ndefaults:\n  - override /recipe: dpo\nrecipe:\n  beta: 0.3\n"
    (tmp_path / "mine" / "experiment" / "ours.yaml").write_text(ours)
    first = fork_server.run("--config-dir", "mine", "experiment=ours", "output_dir=run", *SHORT, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    resumed = fork_server.run("resume=run", "trainer.max_steps=2", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "beta: 0.3" in (tmp_path / "run" / "config.yaml").read_text()
    changed = fork_server.run("resume=run", "recipe.beta=0.9", cwd=tmp_path)
    assert changed.returncode == 2
    assert "recipe.beta: was 0.3" in changed.stderr
