"""W&B online, against a stand-in of its API on the loopback: runs, a server that fails, the dashboard."""

from __future__ import annotations

import csv
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ForkServer
from tests.smoke.test_multirun import JOB
from tests.wandb_server import ENTITY, StoredRun, WandbServer

GRID = ["-m", "sweep.name=grid", "recipe=dpo", "recipe.beta=0.05,0.1", "tracker.tags=[small,tested]"]
SINGLE = ["recipe=dpo", "output_dir=run"]
SHORT = ["tracker.init_timeout=2", "tracker.finish_timeout=3"]
"""Seconds; a run waits for each at most once."""
TRIALS = ("recipe.beta=0.05", "recipe.beta=0.1")


@dataclass(frozen=True)
class Outcome:
    """A command that has ended, where it worked, and what its server holds."""

    done: subprocess.CompletedProcess[str]
    cwd: Path
    server: WandbServer

    @property
    def said(self) -> str:
        return self.done.stdout + self.done.stderr

    @property
    def folder(self) -> Path:
        return self.cwd / "multirun" / "grid"

    def trial(self, name: str) -> StoredRun:
        (run,) = [run for run in self.server.runs.values() if run.fields["displayName"] == f"dpo-tiny {name}"]
        return run


def online(fork: ForkServer, cwd: Path, server: WandbServer, *arguments: str, **environment: str) -> Outcome:
    """Run the command while the server listens."""
    with server:
        told = {**server.environment, "WANDB_HTTP_TIMEOUT": "2", **environment}
        done = fork.run(*arguments, "tracker=wandb", "tracker.mode=online", *JOB, cwd=cwd, **told)
    return Outcome(done, cwd, server)


def closed(fork: ForkServer, cwd: Path) -> Outcome:
    """Run a sweep whose server is down: the port is taken and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        return online(fork, cwd, WandbServer(), *GRID, *SHORT, WANDB_BASE_URL=url)


def offline_then_sync(fork: ForkServer, cwd: Path) -> Outcome:
    """Run the sweep offline, then enter each line that it printed for later, and the one of the leaderboard."""
    done = fork.run(*GRID, "tracker.log_adapter=true", "tracker=wandb", "tracker.mode=offline", *JOB, cwd=cwd)
    lines = re.findall(r"later: (wandb sync .*)", done.stdout)
    assert len(lines) == len(TRIALS), done.stdout + done.stderr
    return synced(Outcome(done, cwd, WandbServer()), *lines, "wandb sync multirun/grid/wandb/offline-run-*")


def synced(outcome: Outcome, *lines: str) -> Outcome:
    """Enter `wandb sync` lines as a user does, and return what a new server holds afterwards."""
    with WandbServer() as server:
        for line in lines:
            command = line.replace("wandb sync", f"{sys.executable} -m wandb sync", 1)
            environment = {"HOME": str(outcome.cwd), **server.environment}
            subprocess.run(["/bin/sh", "-c", command], cwd=outcome.cwd, env=environment, check=True, timeout=60)
    return Outcome(outcome.done, outcome.cwd, server)


COMMANDS: dict[str, Callable[[ForkServer, Path], Outcome]] = {
    "well": lambda fork, cwd: online(fork, cwd, WandbServer(), *GRID, "tracker.log_adapter=true"),
    "offline": offline_then_sync,
    "closed": closed,
    "failing trial": lambda fork, cwd: online(fork, cwd, WandbServer(), *SINGLE, "+trainer.optim_args=nonsense"),
    "errors": lambda fork, cwd: online(fork, cwd, WandbServer("errors"), "recipe=sft", "output_dir=run", *SHORT),
    "silent": lambda fork, cwd: online(fork, cwd, WandbServer("silent"), *SINGLE, *SHORT),
    "dies": lambda fork, cwd: online(fork, cwd, WandbServer(after_start="silent"), *SINGLE, *SHORT),
}


@pytest.fixture(scope="module")
def outcome(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what each command came to; two run at a time, because they mostly import and wait."""
    with ThreadPoolExecutor(2) as pool:
        started: dict[str, Future[Outcome]] = {
            name: pool.submit(command, fork_server, tmp_path_factory.mktemp(name.replace(" ", "-")))
            for name, command in COMMANDS.items()
        }
        yield lambda name: started[name].result()


Ask = Callable[[str], Outcome]


@pytest.fixture(scope="module")
def later(outcome: Ask) -> Ask:
    """Return what the line that a run printed for later brings to a new server; W&B takes a run only once."""

    @cache
    def brought(fault: str) -> Outcome:
        (line,) = re.findall(r"later: (wandb sync .*)", outcome(fault).done.stdout)
        return synced(outcome(fault), line)

    return brought


def test_the_server_understood_everything_and_the_terminal_is_quiet(outcome: Ask) -> None:
    found = outcome("well")
    assert found.done.returncode == 0, found.said
    assert found.server.not_understood == []
    assert found.done.stderr == ""
    assert found.done.stdout.count("wandb online: ") == 2


@pytest.mark.parametrize("name", TRIALS)
def test_each_trial_is_a_run_of_the_sweep(outcome: Ask, name: str) -> None:
    run = outcome("well").trial(name)
    assert (run.fields["groupName"], run.fields["jobType"], run.fields["project"]) == ("grid", "dpo", "lora_exp")
    assert run.fields["tags"] == ["small", "tested"]
    beta = float(name.partition("=")[2])
    assert run.config["sweep/recipe.beta"] == run.config["recipe"]["beta"] == beta
    assert run.config["trainer"]["max_steps"] == 2
    assert (run.state, run.exit_code) == ("finished", 0)


@pytest.mark.parametrize("name", TRIALS)
def test_the_history_is_that_of_the_run_folder(outcome: Ask, name: str) -> None:
    found = outcome("well")
    run = found.trial(name)
    written = [json.loads(line) for line in (found.folder / name / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in run.rows if "samples" not in row]
    assert [row["train/global_step"] for row in logged] == [line["step"] for line in written]
    assert [row["train/loss"] for row in logged if "train/loss" in row] == [
        line["loss"] for line in written if "loss" in line
    ]
    evaluation = next(line for line in written if "eval_loss" in line)
    shown = next(row for row in logged if "eval/loss" in row)
    assert shown["eval/rewards/accuracies"] == evaluation["eval_rewards/accuracies"]
    facts = json.loads((found.folder / name / "run.json").read_text())
    assert run.summary["objective"] == facts["objective"] == evaluation["eval_rewards/accuracies"]
    assert run.summary["status"] == "finished"


@pytest.mark.parametrize("name", TRIALS)
def test_samples_are_a_table_and_the_adapter_an_artifact(outcome: Ask, name: str) -> None:
    found = outcome("well")
    run = found.trial(name)
    (table,) = [json.loads(content) for path, content in run.files.items() if path.startswith("media/table/samples")]
    samples = [json.loads(line) for line in (found.folder / name / "samples.jsonl").read_text().splitlines()]
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == samples
    artifacts = {each.type: each for each in found.server.artifacts.values() if each.run == run.id}
    adapter = found.folder / name / "adapter"
    assert artifacts["model"].name == f"adapter-{run.id}"
    assert artifacts["model"].committed
    kept = {path.relative_to(adapter).as_posix(): path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    assert "adapter_model.safetensors" in kept
    assert {path: artifacts["model"].files[path] for path in kept} == kept


def test_the_leaderboard_is_a_run_of_its_own(outcome: Ask) -> None:
    found = outcome("well")
    (run,) = [run for run in found.server.runs.values() if run.fields["jobType"] == "sweep"]
    assert len(found.server.runs) == len(TRIALS) + 1
    assert run.fields["groupName"] == "grid"
    (table,) = [json.loads(content) for path, content in run.files.items() if path.startswith("media/table/")]
    with (found.folder / "leaderboard.csv").open() as file:
        board = list(csv.DictReader(file))
    assert table["columns"] == list(board[0])
    assert [str(row[table["columns"].index("best_run")]) for row in table["data"]] == [row["best_run"] for row in board]
    assert run.summary["best"] == {"recipe.beta": float(board[0]["recipe.beta"])}
    assert (run.state, run.exit_code) == ("finished", 0)


def test_a_failing_trial_is_a_failed_run(outcome: Ask) -> None:
    found = outcome("failing trial")
    assert found.done.returncode != 0
    (run,) = found.server.runs.values()
    assert (run.state, run.exit_code) == ("failed", 1)
    assert run.summary["status"] == "failed"


# Online and offline ------------------------------------------------------------------------------------


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    """Return what is the same whenever it is computed; of a file, its digest in place of its address."""
    return {
        key: value["sha256"] if isinstance(value, dict) and "sha256" in value else value
        for key, value in values.items()
        if not key.startswith("_") and not key.endswith(("runtime", "_per_second", "memory_bytes"))
    }


@pytest.mark.parametrize("name", TRIALS)
def test_an_offline_run_is_the_same_once_it_is_synced(outcome: Ask, name: str) -> None:
    here, there = outcome("well").trial(name), outcome("offline").trial(name)
    assert there.config["tracker"].pop("mode") == "offline"
    assert here.config["tracker"].pop("mode") == "online"
    assert there.config == here.config
    assert list(map(without_times, there.rows)) == list(map(without_times, here.rows))
    assert without_times(there.summary) == without_times(here.summary)
    for key in ("groupName", "jobType", "tags", "displayName", "project"):
        assert there.fields[key] == here.fields[key]
    assert there.exit_code == here.exit_code
    artifacts = [
        {(each.type, path): content for each in server.artifacts.values() for path, content in each.files.items()}
        for server in (outcome("offline").server, outcome("well").server)
    ]
    assert artifacts[0].keys() == artifacts[1].keys()


# A server that fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["closed", "errors", "silent", "dies"])
def test_a_server_that_fails_ends_no_run(outcome: Ask, fault: str) -> None:
    found = outcome(fault)
    assert found.done.returncode == 0, found.said
    assert "Traceback" not in found.said
    assert found.done.stderr == ""
    facts = [json.loads(path.read_text()) for path in found.cwd.rglob("run.json")]
    assert facts
    assert {each["status"] for each in facts} == {"finished"}
    # One line a run, and the way to bring the rest to the server.
    lines = [line for line in found.done.stdout.splitlines() if "online failed" in line or "wandb failed" in line]
    assert len(lines) == len(facts)
    assert all("; later: wandb sync " in line for line in lines)


def test_the_runs_of_a_process_wait_for_a_server_once(outcome: Ask) -> None:
    found = outcome("closed")
    assert len(list(found.folder.glob("**/wandb/run-*"))) == 1
    assert len(list(found.folder.glob("**/wandb/offline-run-*"))) == len(TRIALS) + 1


@pytest.mark.parametrize("fault", ["errors", "silent", "dies"])
def test_the_line_for_later_brings_the_numbers(later: Ask, fault: str) -> None:
    found = later(fault)
    (run,) = found.server.runs.values()
    assert (run.state, run.exit_code) == ("finished", 0)
    written = [json.loads(line) for line in (found.cwd / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["train/global_step"] for row in run.rows if "samples" not in row]
    assert steps == [line["step"] for line in written]
    assert run.summary["objective"] == json.loads((found.cwd / "run" / "run.json").read_text())["objective"]
    assert run.config["output_dir"] == "run"


# The dashboard -----------------------------------------------------------------------------------------


def dashboard(cwd: Path, server: WandbServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(__file__).parents[2])
    with server:
        return subprocess.run(
            [sys.executable, "-m", "lora_exp.dashboard", "lora_exp", *arguments],
            cwd=cwd,
            env={"HOME": str(cwd), "PYTHONPATH": source, "WANDB_HTTP_TIMEOUT": "2", **server.environment},
            capture_output=True,
            text=True,
            timeout=60,
        )


def test_a_workspace_that_cannot_be_saved_is_no_bug(tmp_path: Path) -> None:
    done = dashboard(tmp_path, WandbServer("errors"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "lora_exp: W&B does not take it: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def view(outcome: Ask) -> dict[str, Any]:
    """Save a workspace for the sweep, and return what the server got."""
    server = WandbServer()
    done = dashboard(outcome("well").cwd, server, "--sweep", "multirun/grid")
    assert (done.returncode, done.stderr, server.not_understood) == (0, "", [])
    (saved,) = server.views
    name = saved["name"].removeprefix("nw-").removesuffix("-v")
    assert done.stdout == f"{server.url}/{ENTITY}/lora_exp?nw={name}\n"
    return saved


def panels_of(view: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def test_the_saved_workspace_has_its_sections_and_groups_by_sweep(view: dict[str, Any]) -> None:
    assert (view["entityName"], view["projectName"], view["type"]) == (ENTITY, "lora_exp", "project-view")
    assert list(panels_of(view)) == ["Objective", "Axes", "DPO rewards", "Throughput and memory"]
    assert all(panels_of(view).values())
    (runs,) = view["spec"]["section"]["runSets"]
    assert runs["grouping"] == [{"section": "run", "name": "group"}]
    (left_out,) = runs["filters"]["filters"]
    assert (left_out["key"], left_out["op"], left_out["value"]) == (
        {"section": "run", "name": "jobType"},
        "!=",
        "sweep",
    )


def test_the_axes_lead_to_the_objective(view: dict[str, Any], outcome: Ask) -> None:
    every, *single = panels_of(view)["Axes"]
    assert every["viewType"] == "Parallel Coordinates Plot"
    assert [column["accessor"] for column in every["config"]["columns"]] == [
        "config:recipe.value.beta",
        "summary:objective",
    ]
    assert [(panel["config"]["xAxis"], panel["config"]["yAxis"]) for panel in single] == [
        ("config:recipe.value.beta", "summary:objective")
    ]
    for name in TRIALS:
        run = outcome("well").trial(name)
        key, _, rest = "recipe.value.beta".partition(".value.")
        assert run.config[key][rest] == run.config["sweep/recipe.beta"]


def test_every_metric_of_a_panel_is_one_that_a_run_logs(view: dict[str, Any], outcome: Ask, later: Ask) -> None:
    dpo = outcome("well").trial(TRIALS[0])
    (sft,) = later("errors").server.runs.values()
    assert (dpo.fields["jobType"], sft.fields["jobType"]) == ("dpo", "sft")
    curves, bars = set(), set()
    for panel in (panel for panels in panels_of(view).values() for panel in panels):
        if panel["viewType"] == "Run History Line Plot":
            assert panel["config"]["xAxis"] == "train/global_step"
            curves |= set(panel["config"]["metrics"])
        elif panel["viewType"] == "Bar Chart":
            bars |= set(panel["config"]["metrics"])
    assert {"eval/loss", "eval/rewards/margins", "train/rewards/chosen"} <= curves
    assert {"objective", "peak_memory_bytes"} <= bars
    assert curves <= dpo.logged() | sft.logged()
    assert bars <= set(dpo.summary)
    assert {"eval/loss", "eval/mean_token_accuracy", "train/loss"} <= curves & sft.logged()


def test_the_stand_in_was_asked_and_no_other_server(outcome: Ask) -> None:
    assert outcome("well").server.url.startswith("http://127.0.0.1:")
    assert f"{outcome('well').server.url}/{ENTITY}/lora_exp/runs/" in outcome("well").done.stdout
    assert outcome("errors").server.asked > 0
