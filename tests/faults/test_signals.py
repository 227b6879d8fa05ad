"""A run that is asked to leave writes a checkpoint, leaves with the signal's status, and goes on as if it had not."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from tests.faults.harness import Ended, Moment, Server, Tally, after, later, outcome, when_logged, when_there
from tests.faults.test_kills import COMMON, RUNS

SFT = [*COMMON, *RUNS["sft"]]
STATUS = {"SIGTERM": 143, "SIGUSR1": 143, "SIGINT": 130, "SIGHUP": 129}


def facts(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "run.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run that nobody disturbs."""
    cwd = tmp_path_factory.mktemp("alone")
    ended = server.run(*SFT, "output_dir=run", cwd=cwd)
    assert ended.status == 0, ended.said
    return cwd / "run"


def end_with(server: Server, cwd: Path, harm: dict[str, Moment], *overrides: str) -> Ended:
    return server.run(*SFT, *overrides, "output_dir=run", cwd=cwd, folder=cwd / "run", harm=harm)


@pytest.mark.parametrize(
    "name", [name if name == "SIGTERM" else pytest.param(name, marks=pytest.mark.faults) for name in STATUS]
)
def test_a_signal_has_a_checkpoint_written_and_its_status_left(
    server: Server, alone: Path, tally: Tally, random: Random, tmp_path: Path, name: str
) -> None:
    ended = end_with(server, tmp_path, {name: when_logged(random.randint(1, 9))})
    tally.inject(f"{name} in a run")
    folder = tmp_path / "run"
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.partition("-")[2]))
    assert ended.status == STATUS[name], ended.said
    assert f"interrupted by {name} at step" in ended.said
    assert f"go on from {newest.name} with python -m lora_exp resume=run" in ended.said
    assert "Traceback" not in ended.said
    assert facts(folder)["status"] == "failed"
    assert facts(folder)["error"].startswith(f"interrupted by {name} at step")
    step = json.loads((newest / "trainer_state.json").read_text())["global_step"]
    assert f"at step {step} of 10" in facts(folder)["error"], "the checkpoint is of the step that it ended with"
    assert server.run("resume=run", cwd=tmp_path).status == 0
    assert outcome(folder)["checkpoints"][-1:] == outcome(alone)["checkpoints"][-1:]
    assert {**outcome(folder), "checkpoints": 0} == {**outcome(alone), "checkpoints": 0}
    tally.survive(f"{name} in a run")


@pytest.mark.faults
def test_an_evaluation_that_is_left_is_made_first_when_the_run_goes_on(
    server: Server, tally: Tally, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # One row at a time, so that there is an evaluation to be in; the fourth line is the loss that comes before it.
    slowly = ["trainer.per_device_eval_batch_size=1", "trainer.logging_first_step=false"]
    cwd = tmp_path_factory.mktemp("slowly")
    assert end_with(server, cwd, {}, *slowly).status == 0
    ended = end_with(server, tmp_path, {"SIGTERM": when_logged(4)}, *slowly)
    tally.inject("SIGTERM in an evaluation")
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    assert ended.status == 143, ended.said
    assert state["stateful_callbacks"]["Totals"]["attributes"]["due"] == ["evaluation"]
    assert server.run("resume=run", cwd=tmp_path).status == 0
    assert {**outcome(tmp_path / "run"), "checkpoints": 0} == {**outcome(cwd / "run"), "checkpoints": 0}
    tally.survive("SIGTERM in an evaluation")


@pytest.mark.parametrize(
    "moment", [when_there("metrics.json"), pytest.param(when_logged(13), marks=pytest.mark.faults)]
)
def test_after_the_last_step_the_training_is_kept_where_no_checkpoints_are_asked_for(
    server: Server, tally: Tally, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, moment: Moment
) -> None:
    """After the summary of the training, in the evaluation or the answers; and in the last moment of all."""
    without = ["trainer.save_strategy=no", "trainer.per_device_eval_batch_size=1"]
    cwd = tmp_path_factory.mktemp("without")
    assert end_with(server, cwd, {}, *without).status == 0
    ended = end_with(server, tmp_path, {"SIGTERM": moment}, *without)
    tally.inject("SIGTERM after the last step")
    assert ended.status == 143, ended.said
    assert "go on from checkpoint-10 with" in ended.said
    assert server.run("resume=run", cwd=tmp_path).status == 0
    assert {**outcome(tmp_path / "run"), "checkpoints": 0} == {**outcome(cwd / "run"), "checkpoints": 0}
    tally.survive("SIGTERM after the last step")


@pytest.mark.faults
@pytest.mark.parametrize("second", [None, "SIGINT again"], ids=["time is up", "Ctrl-C twice"])
def test_a_step_that_does_not_end_is_given_up(server: Server, tally: Tally, tmp_path: Path, second: str | None) -> None:
    # All rows in one step, which takes seconds. The signal comes when the second one has begun.
    long = ["recipe.max_length=512", "engine=padded", "trainer.per_device_train_batch_size=240"]
    long += ["trainer.eval_strategy=no", "trainer.save_strategy=no", f"trainer.grace_seconds={600 if second else 1}"]
    kind = "Ctrl-C twice in a long step" if second else "a step that outlasts the grace"
    harm = {"SIGINT": later(when_logged(1), 0.05)}
    if second:
        harm[second] = later(after(0), 0.7)
    ended = end_with(server, tmp_path, harm, *long)
    tally.inject(kind)
    assert ended.status == 130, ended.said
    assert "interrupted by SIGINT" in ended.said
    assert ("did not end within 1 s" in ended.said) == (second is None), ended.said
    assert facts(tmp_path / "run")["status"] == "failed"
    tally.survive(kind)


@pytest.mark.faults
def test_before_the_first_step_a_run_leaves_at_once(server: Server, tally: Tally, tmp_path: Path) -> None:
    ended = end_with(server, tmp_path, {"SIGTERM": when_there("run.json", 0.2)}, "samples.max_new_tokens=2000")
    tally.inject("SIGTERM before the first step")
    assert ended.status == 143, ended.said
    assert "in the stage" in ended.said
    assert server.run("resume=run", "samples.max_new_tokens=4", cwd=tmp_path).status == 0
    tally.survive("SIGTERM before the first step")


@pytest.mark.faults
def test_a_sweep_stops_and_the_same_command_goes_on(
    server: Server, tally: Tally, random: Random, tmp_path: Path
) -> None:
    sweep = ["-m", *SFT, "sweep.name=grid", "lora.r=4,8"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    assert server.run(*sweep, cwd=whole).status == 0
    trial = stopped / "multirun" / "grid" / "lora.r=4"
    ended = server.run(*sweep, cwd=stopped, folder=trial, harm={"SIGTERM": when_logged(random.randint(1, 8))})
    tally.inject("SIGTERM in a sweep")
    assert ended.status == 143, ended.said
    assert "with the same command" in ended.said
    assert not (stopped / "multirun" / "grid" / "lora.r=8" / "run.json").exists()
    ended = server.run(*sweep, cwd=stopped)
    assert ended.status == 0, ended.said
    for name in ("lora.r=4", "lora.r=8"):
        folders = [each / "multirun" / "grid" / name for each in (whole, stopped)]
        assert outcome(folders[0])["adapter"] == outcome(folders[1])["adapter"]
        assert outcome(folders[0])["metrics.jsonl"] == outcome(folders[1])["metrics.jsonl"]
    tally.survive("SIGTERM in a sweep")


@pytest.mark.faults
def test_a_signal_that_is_ignored_stays_ignored(server: Server, tmp_path: Path) -> None:
    """As nohup has it, and a shell for what it starts in the background."""
    harm = {"SIGHUP": after(2.0)}
    ended = server.run(*SFT, "output_dir=run", cwd=tmp_path, harm=harm, ignored=["SIGHUP"])
    assert ended.status == 0, ended.said
