"""A run that goes on or is reproduced has the threads that it began with; a sweep's child has the environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp.errors import UserError
from lora_exp.process.start import NVML_CHECK
from lora_exp.reports.differences import ADAPTER
from lora_exp.reproduce import reproduce
from lora_exp.run import Launch, run
from tests.few import ROWS
from tests.runs import composed, run_in

RUN = ["tracker=none", "recipe=sft", "trainer.bf16=false", "samples.num_prompts=0", "trainer.eval_strategy=no", *ROWS]
BEGAN = 8
"""Threads at first, more than cores or not. One thread gives other bits here, on an AMD EPYC with MKL 2024.2."""
STEPS = ["trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2"]
ONE = ["trainer.max_steps=1", "trainer.save_strategy=no"]
MODULE = ("-m", "lora_exp")


def bits(folder: Path) -> bytes:
    return (folder / "adapter" / ADAPTER).read_bytes()


def recorded(folder: Path) -> int:
    return int(json.loads((folder / "run.json").read_text())["device"]["threads"])


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != NVML_CHECK}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, check=False
    )


# Commands -------------------------------------------------------------------------------------------


PROBE = """
import json, os
from pathlib import Path
from lora_exp.tracking.none import NoTracker, Unwatched
class Probe(NoTracker):
    def start(self, info):
        found = {"process": os.getpid(), "environment": dict(os.environ)}
        Path(os.environ["PROBED"], f"{info.config['seed']}.json").write_text(json.dumps(found))
        return Unwatched()
"""


@pytest.mark.parametrize("allocator", ["mimalloc", "system"])
def test_the_process_that_a_sweep_works_in_has_the_environment_in_every_trial(tmp_path: Path, allocator: str) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    done = command(
        *MODULE,
        *("-m", "sweep.name=s", "seed=1,2", *RUN, *ONE, "recipe.max_length=64", "tracker._target_=probe.Probe"),
        cwd=tmp_path,
        OMP_NUM_THREADS="1",
        PROBED=str(tmp_path),
        PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}",
        LORA_EXP_ALLOCATOR=allocator,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in (1, 2):
        environment = json.loads((tmp_path / f"{seed}.json").read_text())["environment"]
        assert environment[NVML_CHECK] == "1"


# The recorded count -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin with several threads by the environment; leave the count of this process as it was."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(BEGAN))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("threads") / "whole"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", str(BEGAN))
        run_in(folder, [*RUN, *STEPS])
    assert recorded(folder) == BEGAN
    return folder


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """Return the folder as if the run had been killed after step 3."""
    shutil.copytree(whole, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "checkpoint-4")
    shutil.rmtree(tmp_path / "broken" / "adapter")
    return tmp_path / "broken"


def test_a_resumed_run_has_the_threads_that_it_began_with(
    whole: Path, broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_in(broken, [*RUN, *STEPS, f"resume={broken}"])
    assert f"{BEGAN} threads: as the run began" in capsys.readouterr().out
    assert recorded(broken) == BEGAN
    assert bits(broken) == bits(whole)


def test_a_count_that_is_given_now_overrides_the_record(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_in(broken, [*RUN, *STEPS, f"resume={broken}", "engine.num_threads=1"])
    assert "1 thread: engine.num_threads=1" in capsys.readouterr().out
    assert recorded(broken) == 1


def test_a_run_without_a_record_goes_on_with_what_a_new_one_has(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads((broken / "run.json").read_text())
    del facts["device"]
    (broken / "run.json").write_text(json.dumps(facts))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_in(broken, [*RUN, *STEPS, f"resume={broken}"])
    assert recorded(broken) == 1


def test_a_resume_that_fails_before_it_trains_keeps_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(str(files("lora_exp.data").joinpath("sample")), tmp_path / "rows")
    rows = [*RUN, *STEPS, "data=splits", f"data.splits_dir={tmp_path / 'rows'}"]
    folder = run_in(tmp_path / "run", rows).folder
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "rows").rename(tmp_path / "away")
    with pytest.raises(UserError):
        run_in(folder, [*rows, f"resume={folder}"])
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    (tmp_path / "away").rename(tmp_path / "rows")
    run_in(folder, [*rows, f"resume={folder}"])
    assert recorded(folder) == BEGAN


def test_a_broken_trial_of_a_sweep_goes_on_with_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: Any) -> None:
        raise RuntimeError("stopped")

    folder = tmp_path / "trial"
    config = composed([*RUN, *ONE])
    with pytest.raises(RuntimeError, match="stopped"):
        run(config, Launch(folder, sweep="s", before_training=stop))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(config, Launch(folder, sweep="s"))
    assert f"{BEGAN} threads: as the run began" in capsys.readouterr().out
    assert recorded(folder) == BEGAN


def test_a_reproduction_has_the_threads_of_the_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert reproduce(whole, tmp_path / "again", anyway=False) == 0
    assert f"{BEGAN} threads: as the run began" in capsys.readouterr().out
    assert recorded(tmp_path / "again") == BEGAN
    assert bits(tmp_path / "again") == bits(whole)
