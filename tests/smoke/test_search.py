"""`hydra/sweeper=optuna`, really trained: pruned trials, a kill in the middle, the best point."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from tests.few import ROWS
from tests.forked import ForkServer

SEARCH = [
    "-m",
    "sweep.name=search",
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=5",
    "hydra.sweeper.sampler.n_startup_trials=3",
    "hydra.sweeper.pruner.n_startup_trials=1",
    "trainer.learning_rate=tag(log,interval(1e-6,1e-2))",
    "lora.r=choice(4,16)",
    "tracker=none",
    "samples.num_prompts=0",
    "trainer.max_steps=6",
    "trainer.lr_scheduler_type=constant",
    "trainer.eval_strategy=steps",
    "trainer.eval_steps=2",
    "trainer.save_strategy=steps",
    "trainer.save_steps=2",
    *ROWS,
]


def runs(cwd: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(cwd.glob("multirun/search/*/run.json"))}


def found(cwd: Path) -> list[Any]:
    """Return what is in the study."""
    storage = f"sqlite:///{cwd}/multirun/search/study.sqlite3"
    (name,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).trials
    return [(t.number, t.params, t.state.name, t.values, t.intermediate_values) for t in trials]


@pytest.fixture(scope="module")
def undisturbed(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("undisturbed")
    done = fork_server.run(*SEARCH, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd


def test_trials_are_finished_or_pruned_and_none_failed(undisturbed: Path) -> None:
    states = [run["status"] for run in runs(undisturbed).values()]
    assert len(states) == 5
    assert set(states) == {"finished", "pruned"}
    for name, run in runs(undisturbed).items():
        if run["status"] == "pruned":
            assert "falls behind" in run["pruned"]
            assert run["error"] is None
            assert (undisturbed / "multirun/search" / name / "report.html").is_file()


def test_the_best_trial_is_that_of_the_leaderboard(undisturbed: Path) -> None:
    folder = undisturbed / "multirun/search"
    results = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    board = json.loads((folder / "leaderboard.json").read_text())
    assert results["best_value"] == board["points"][0]["objective"]["mean"]
    assert results["best_params"] == board["points"][0]["axes"]
    assert board["direction"] == "minimize"
    assert [point["status"] for point in board["points"]].count("pruned") == [
        state for *_, state, _, _ in found(undisturbed)
    ].count("PRUNED")


def test_every_evaluation_is_reported(undisturbed: Path) -> None:
    for _, params, state, values, reported in found(undisturbed):
        name = ",".join(f"{key}={value}" for key, value in params.items())
        lines = (undisturbed / "multirun/search" / name / "metrics.jsonl").read_text().splitlines()
        losses = [loss for line in lines if (loss := json.loads(line).get("eval_loss")) is not None]
        assert list(reported.values()) == losses[: len(reported)]
        assert len(reported) == 3 if state == "COMPLETE" else 1 <= len(reported) <= 3
        assert values == [losses[-1]], "a pruned trial keeps what it had reached"


def test_the_same_command_again_has_nothing_to_do(fork_server: ForkServer, undisturbed: Path) -> None:
    before = found(undisturbed), runs(undisturbed)
    done = fork_server.run(*SEARCH, cwd=undisturbed)
    assert done.returncode == 0, done.stderr
    assert (found(undisturbed), runs(undisturbed)) == before


def test_killed_and_started_again_it_draws_and_finds_the_same(
    fork_server: ForkServer, undisturbed: Path, tmp_path: Path
) -> None:
    kills = 0
    log = tmp_path / "log.txt"
    for seconds in (1.5, 4.0, 6.0):
        process = fork_server.start(*SEARCH, cwd=tmp_path, stdout=log, stderr=log, environment={"HOME": str(tmp_path)})
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait() == -signal.SIGKILL
            kills += 1
    assert kills
    done = fork_server.run(*SEARCH, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert found(tmp_path) == found(undisturbed)
    board = "multirun/search/leaderboard.csv"
    assert (tmp_path / board).read_bytes() == (undisturbed / board).read_bytes()
