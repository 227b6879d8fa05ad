"""One run at every tracker: what it holds is what the run folder holds; it says nothing and asks nobody."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from lora_exp.config import CONF_DIR
from lora_exp.tracking.base import RunInfo
from tests.few import ROWS
from tests.runs import composed
from tests.sweeps import make_sweep
from tests.tracker_records import READERS, Record, differences, written

TRACKERS = list(READERS)
RUN = [
    "recipe=dpo",
    "recipe.beta=0.2",
    "sweep.axes=[recipe.beta,lora]",
    "trainer.max_steps=3",
    "trainer.logging_steps=1",
    "trainer.eval_on_start=true",
    "samples.num_prompts=2",
    "samples.max_new_tokens=4",
    "tracker.tags=[small,tested]",
    "tracker.notes=only a test",
    "tracker.log_adapter=true",
    *ROWS,
]
ENDINGS = {
    "wandb": {"finished": 0, "failed": 1, "pruned": 0},
    "tensorboard": {"finished": 1, "failed": 2, "pruned": 1},
    "mlflow": {"finished": "FINISHED", "failed": "FAILED", "pruned": "KILLED"},
    "trackio": dict.fromkeys(("finished", "failed", "pruned")),
}
"""Each tracker's own word; where it has none for a state, the text `status` tells it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the runs, which is also where stores are looked for."""
    import wandb

    place = tmp_path_factory.mktemp("trackers")
    os.environ["TRACKIO_DIR"] = str(place / "trackio")
    # After another file in this process: Trackio has its folder since it was imported, W&B's service since it started.
    for name in [each for each in sys.modules if each.partition(".")[0] == "trackio"]:
        del sys.modules[name]
    wandb.teardown()
    return place


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_MODE", "offline")


Made = tuple[Path, Record, str]


@pytest.fixture(scope="module")
def made(place: Path) -> Callable[[str, pytest.CaptureFixture[str]], Made]:
    """Return a function that makes the run at a tracker once: its folder, the record, what the terminal showed."""
    from lora_exp.run import Launch, run

    done: dict[str, Made] = {}

    def make(tracker: str, terminal: pytest.CaptureFixture[str]) -> Made:
        if tracker not in done:
            folder = place / f"{tracker}-run"
            launch = Launch(folder, {"recipe": "dpo", "lora": "lora"}, "grid", f"dpo-tiny {folder.name}")
            terminal.readouterr()
            run(composed([*RUN, f"tracker={tracker}", f"output_dir={folder}"]), launch)
            said = terminal.readouterr()
            assert said.err == ""
            done[tracker] = folder, READERS[tracker](folder), said.out
        return done[tracker]

    return make


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_holds_what_the_run_folder_holds(tracker: str, made: Any, capfd: pytest.CaptureFixture[str]) -> None:
    folder, record, _ = made(tracker, capfd)
    assert ("train/loss", 3) in record.history
    assert ("eval/loss", 0) in record.history
    assert differences(record.history, written(folder), single=tracker == "tensorboard") == {}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_summary_is_that_of_the_run(tracker: str, made: Any, capfd: pytest.CaptureFixture[str]) -> None:
    folder, record, _ = made(tracker, capfd)
    facts = json.loads((folder / "run.json").read_text())
    final = json.loads((folder / "metrics.json").read_text())
    expected = {**final, "objective": facts["objective"], "peak_memory_bytes": facts["peak_memory_bytes"]}
    shown = {name: value for name, value in record.summary.items() if name in expected}
    assert differences(shown, expected, single=tracker == "tensorboard") == {}
    assert record.status == facts["status"] == "finished"
    assert record.ending == ENDINGS[tracker]["finished"]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_config_is_there_with_the_axes_apart(tracker: str, made: Any, capfd: pytest.CaptureFixture[str]) -> None:
    folder, record, _ = made(tracker, capfd)
    assert float(record.config["sweep/recipe.beta"]) == float(record.config["recipe.beta"]) == 0.2
    assert record.config["sweep/lora"] == "lora"
    kept = OmegaConf.load(folder / "config.yaml")
    for key in ("lora.r", "trainer.learning_rate", "recipe.max_length", "seed"):
        assert float(record.config[key]) == OmegaConf.select(kept, key), key
    assert record.config["model.pretrained_model_name_or_path"] == kept.model.pretrained_model_name_or_path
    assert str(record.config["recipe.loss_type"]) == kept.recipe.loss_type


@pytest.mark.parametrize("tracker", TRACKERS)
def test_every_key_has_its_place_or_the_run_says_where_it_is(
    tracker: str, made: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, record, said = made(tracker, capfd)
    wanted = {
        "name": f"dpo-tiny {folder.name}",
        "group": "grid",
        "tags": ["small", "tested"],
        "notes": "only a test",
    }
    (line,) = [line for line in said.splitlines() if line.lstrip().startswith("tracker ")]
    for key, value in wanted.items():
        assert record.about.get(key) == value or f"tracker.{key}" in line, key
    adapter = {path.relative_to(folder / "adapter").as_posix() for path in (folder / "adapter").rglob("*")}
    assert "adapter_model.safetensors" in adapter
    assert record.files == adapter or "tracker.log_adapter" in line
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert record.tables["samples"] == samples


def config_of(tracker: str) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "tracker" / f"{tracker}.yaml"))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def test_all_trackers_have_the_same_keys() -> None:
    shared = set(config_of("none"))
    assert {"project", "name", "group", "tags", "notes", "log_adapter"} < shared
    for tracker in TRACKERS:
        assert shared <= set(config_of(tracker)), tracker


# Endings, and the leaderboard ---------------------------------------------------------------------------

ALONE = """
import json, os, socket, sys
from pathlib import Path
asked = []
resolve = socket.getaddrinfo
def getaddrinfo(host, *rest, **more):
    if host not in ("localhost", "127.0.0.1", "::1", None):
        asked.append(str(host))
        raise OSError("no network in this test")
    return resolve(host, *rest, **more)
socket.getaddrinfo = getaddrinfo
from hydra.utils import get_class
from lora_exp.tracking.base import Guarded, RunInfo
section, folder, status, out = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
folder.mkdir(exist_ok=True)
before = dict(os.environ)
config = {"output_dir": str(folder), "recipe": {"beta": 0.1}}
info = RunInfo(folder, config, f"dpo-tiny {folder.name}", None, "dpo", {})
run = Guarded.start(get_class(section["_target_"]).model_validate(section), info)
run.log({"loss": 1.0, "epoch": 0.5}, 1)
run.log({"eval_loss": 2.0}, 1)
run.finish(status)
leaked = sorted(os.environ.keys() ^ before.keys())
out.write_text(json.dumps({"asked": asked, "leaked": leaked, "failure": run.failure}))
"""
"""A run at a tracker and nothing else in the process, without a network, and not seen to be a test."""


def alone(tracker: str, folder: Path, status: str, uri: str | None = None, **environment: str) -> dict[str, Any]:
    """Return what was asked of the network, what was left in the environment, and the tracker's failure."""
    section = config_of(tracker) | ({"tracking_uri": uri} if uri else {})
    place, out = folder.parent, folder.with_suffix(".json")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "CI", "GITHUB"))}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(section), str(folder), status, str(out)],
        cwd=place,
        env={**kept, "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(place), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    told: dict[str, Any] = json.loads(out.read_text())
    assert done.stdout == ""
    assert done.stderr == (f"{told['failure']}\n" if told["failure"] else "")
    return told


@pytest.mark.parametrize("status", ["failed", "pruned"])
@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_run_ends_as_what_it_is_and_asks_nobody(tracker: str, status: str, place: Path) -> None:
    folder = place / f"{tracker}-{status}"
    told = alone(tracker, folder, status)
    # What W&B leaves in the environment, the corridor takes away with all else that a job leaves.
    told["leaked"] = [name for name in told["leaked"] if "WANDB" not in name]
    assert told == {"asked": [], "leaked": [], "failure": None}
    record = READERS[tracker](folder)
    assert record.status == status
    assert record.ending == ENDINGS[tracker][status]
    assert record.history == {("train/loss", 1): 1.0, ("train/epoch", 1): 0.5, ("eval/loss", 1): 2.0}


def test_what_the_user_says_of_telemetry_goes_first(place: Path) -> None:
    """And what the tests above look at would see it."""
    told = alone("mlflow", place / "telemetry", "finished", MLFLOW_DISABLE_TELEMETRY="false")
    assert any("mlflow" in host for host in told["asked"])


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow", "trackio"])
def test_a_run_that_goes_on_is_the_same_one_with_each_number_once(tracker: str, place: Path) -> None:
    """Stopped after step 2, it goes on from step 1; the tracker has lost step 0, as where a kill came first."""
    folder = place / f"{tracker}-goes-on"
    folder.mkdir()
    section = config_of(tracker)
    kind = get_class(section["_target_"])
    info = RunInfo(folder, {"seed": 1}, f"dpo-tiny {folder.name}", "grid", "dpo", {"seed": 1})
    run = kind.model_validate(section).start(info)
    run.log({"loss": 0.75}, 1)
    run.log({"loss": 0.5}, 2)
    run.finish("failed")
    lines = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.75}, {"step": 2, "loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = kind.model_validate(section).start(replace(info, config={"seed": 2}, goes_on=True, logged=2))
    run.log({"loss": 0.5}, 2)
    run.log({"loss": 0.25}, 3)
    run.finish("finished")
    record = READERS[tracker](folder)
    assert sorted(record.events["train/loss"]) == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]
    assert record.status == "finished"
    assert record.ending == ENDINGS[tracker]["finished"]


@pytest.mark.parametrize(
    ("tracker", "uri", "environment", "reason"),
    [
        ("trackio", None, {"TRACKIO_DIR": "/dev/null/here"}, "/dev/null/here"),
        ("tensorboard", None, {}, "tensorboard"),
        ("mlflow", "sqlite:////dev/null/mlflow.db", {}, "/dev/null"),
        ("mlflow", "http://127.0.0.1:9", {}, "127.0.0.1"),  # the port `discard`: nobody listens
    ],
)
def test_a_place_that_cannot_be_written_ends_no_run(
    tracker: str, uri: str | None, environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tensorboard").write_text("a file where a folder is to be")
    begin = time.monotonic()
    failure = alone(tracker, folder, "finished", uri, **environment)["failure"]
    assert failure.startswith(f"{tracker} failed and is left out from here on: ")
    assert reason in failure
    assert "\n" not in failure
    assert time.monotonic() - begin < 60


def numbers(row: dict[str, str]) -> dict[str, Any]:
    return {key: float(value) if re.fullmatch(r"-?[\d.e-]+", value) else value for key, value in row.items()}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_leaderboard_is_a_table_in_a_run_of_its_own(tracker: str, place: Path) -> None:
    from lora_exp.reports.sweep_page import write_sweep
    from lora_exp.sweeps.summary_run import log_leaderboard

    sweep = make_sweep(Path("multirun") / tracker)
    for config in sweep.glob("*/config.yaml"):
        config.write_text(OmegaConf.to_yaml({**OmegaConf.load(config), "tracker": config_of(tracker)}))
    log_leaderboard(sweep, write_sweep(sweep))
    record = READERS[tracker](sweep)
    with (sweep / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in record.tables["leaderboard"]] == [list(row) for row in rows]
    assert list(map(numbers, record.tables["leaderboard"])) == list(map(pytest.approx, map(numbers, rows)))
    assert record.about["group"] == tracker
    assert record.summary["objective"] == pytest.approx(0.836, abs=0.01)
    assert record.status == "finished"
