"""The same config gives the same bits, and `reproduce` says what differs where it does not."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_exp.errors import UserError
from lora_exp.reports.differences import ADAPTER, outcome
from lora_exp.reproduce import RECORD, reproduce
from lora_exp.run import Launch, run
from tests.conftest import HEAVY
from tests.few import pairs, write_rows
from tests.runs import Finished, FinishedRun, composed, load_policy, run_in
from tests.smoke.test_training import QUANTS, RECIPES, SHORT

QUICK = ["tracker=none", "recipe=sft", "recipe.max_length=64", "samples.num_prompts=0", "trainer.max_steps=2"]
OTHER_SEED = ("recipe=sft", "quant=none", "seed=7", *SHORT)
CLOCK = ("runtime", "per_second")


def bits(folder: Path) -> bytes:
    return (folder / "adapter" / ADAPTER).read_bytes()


def logged(run: FinishedRun) -> list[dict[str, Any]]:
    """Return every logged number that is not the clock's."""
    return [{key: value for key, value in line.items() if not key.endswith(CLOCK)} for line in run.results.steps]


def start(folder: Path) -> dict[str, torch.Tensor]:
    """Return the parameters of a run's policy as they are before the first step."""
    policy, _ = load_policy(folder)
    return {name: each.detach().clone() for name, each in policy.model.named_parameters()}


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_config_gives_the_same_bits(finished: Finished, tmp_path: Path, recipe: str, quant: str) -> None:
    run = [f"recipe={recipe}", f"quant={quant}", *SHORT]
    if quant == "none":
        # Both compute the references. Those that are kept were computed beside other rows, and rounded otherwise.
        first = run_in(tmp_path / "first", ["tracker=none", *run, f"store.path={tmp_path / 'first.sqlite3'}"])
        store = [f"store.path={tmp_path / 'again.sqlite3'}"]
    else:
        first, store = finished(*run), []
    for seed in (torch.manual_seed, random.seed, np.random.seed):  # what the process did before must not matter
        seed(12345)
    again = run_in(tmp_path / "again", [*first.overrides, *store])
    assert bits(again.folder) == bits(first.folder)
    assert logged(again) == logged(first)
    assert (again.folder / "samples.jsonl").read_text() == (first.folder / "samples.jsonl").read_text()
    assert again.results.run["base"] == first.results.run["base"]


def test_the_seed_sets_the_order_of_the_rows_and_the_start_of_the_adapter(finished: Finished, tmp_path: Path) -> None:
    runs = [finished("recipe=sft", "quant=none", *SHORT), finished(*OTHER_SEED)]
    # As long as the adapter adds nothing, the first loss is the base's on the first rows.
    assert len({run.results.steps[0]["loss"] for run in runs}) == 2
    starts = [{name: each for name, each in start(run.folder).items() if "lora_A" in name} for run in runs]
    assert not any(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


# deterministic=true ----------------------------------------------------------------------------------


def switches() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    environment = {name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING")}
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, environment


@pytest.mark.parametrize("recipe", RECIPES)
def test_deterministic_algorithms_are_asked_for_and_only_in_this_job(tmp_path: Path, recipe: str) -> None:
    before, seen = switches(), list[Any]()
    config = composed([*QUICK, f"recipe={recipe}", "deterministic=true"])
    run(config, Launch(tmp_path / "run", before_training=lambda _: seen.append(switches())))
    ((algorithms, cudnn, benchmark, environment),) = seen
    assert algorithms
    assert cudnn
    assert not benchmark
    assert environment["CUBLAS_WORKSPACE_CONFIG"] in (":16:8", ":4096:8")  # what NVIDIA says is deterministic
    assert switches() == before
    assert not before[0]


def test_an_operation_without_such_an_algorithm_is_told_with_its_mend(tmp_path: Path) -> None:
    def put(_: Any) -> None:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    config = composed(["tracker=none", "deterministic=true", *SHORT])
    with pytest.raises(UserError) as caught:
        run(config, Launch(tmp_path / "run", before_training=put))
    (problem,) = caught.value.problems
    assert problem.where == "deterministic"
    assert "put_" in problem.what
    assert "deterministic=false" in problem.mend
    assert not torch.are_deterministic_algorithms_enabled()


# reproduce -------------------------------------------------------------------------------------------


@pytest.fixture
def original(tmp_path: Path) -> FinishedRun:
    """A short run on rows that can be changed."""
    return run_in(tmp_path / "run", [*QUICK, "data=splits", *write_rows(tmp_path / "rows", pairs(27))])


def command(*arguments: Any, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **more}
    words = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_run_json_names_all_that_the_run_was_made_of(original: FinishedRun, tmp_path: Path) -> None:
    facts = original.results.run
    for split in ("train", "val"):
        name = str(tmp_path / "rows" / f"{split}.jsonl")
        told = subprocess.run(["sha256sum", name], capture_output=True, text=True, check=True).stdout.split()[0]
        assert facts["data"][split]["sha256"] == {name: told}
    # The package's version; a wheel of PyPI is built for CUDA without saying so there (2.14.1 of 2.14.1+cu130).
    assert facts["versions"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert facts["git"].keys() == {"commit", "dirty", "changes"}
    assert facts["device"]["threads"] == torch.get_num_threads()
    assert facts["base"]["name"] == "lora_exp/tiny"
    assert len(facts["base"]["xxh3"]) == 32
    assert facts["trust_remote_code"] is False


def test_the_rows_of_a_hub_data_set_are_named_too(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n}"}) + "\n" for n in range(16)))
    data = ["data=hub", "data.path=json", f"+data.data_files.train={rows}", "data.val_split=null"]
    done = run_in(tmp_path / "run", [*QUICK, *data, "trainer.eval_strategy=no"])
    told = subprocess.run(["sha256sum", str(rows)], capture_output=True, text=True, check=True).stdout.split()[0]
    facts = done.results.run["data"]["train"]
    assert facts["sha256"] == {str(rows): told}
    assert facts["revision"] is None, "which would change with the time of the file"


def test_a_run_is_reproduced_by_a_command_in_another_process(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished("recipe=sft", "quant=4bit", *SHORT).folder, folder)
    # Where the run was: git is asked for the state there. On the allocator of this process, which the run has had.
    done = command("lora_exp.reproduce", folder, cwd=Path.cwd(), LORA_EXP_ALLOCATOR="system")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as they were") == 2, done.stdout
    assert "bitwise equal" in done.stdout
    assert bits(tmp_path / "run-reproduced") == bits(folder)
    record = json.loads((tmp_path / "run-reproduced" / RECORD).read_text())
    assert record == {"of": str(folder), "same": True, "adapter": "bitwise equal", "inputs": [], "numbers": []}


def test_changed_data_are_an_error_at_once_and_anyway_a_comparison(
    original: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows" / "train.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:20]))
    refused = command("lora_exp.reproduce", original.folder, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert refused.returncode == 2
    assert f"{rows}: is not what it was" in refused.stderr
    assert "--anyway" in refused.stderr
    imported = set(re.findall(r"\| +(\S+)$", refused.stderr, re.MULTILINE))
    assert "rich" in imported
    assert not imported & set(HEAVY), "it answers at once"
    assert not (tmp_path / "run-reproduced").exists()

    capsys.readouterr()
    assert reproduce(original.folder, tmp_path / "other", anyway=True) == 1
    said = capsys.readouterr().out
    assert said.index("these changed") < said.index("machine"), "before anything is trained"
    assert "differs in" in said
    record = json.loads((tmp_path / "other" / RECORD).read_text())
    assert not record["same"]
    assert [each["name"] for each in record["inputs"]] == [f"data train: {rows}"]
    differing = {each["name"]: each for each in record["numbers"]}
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (original.folder, tmp_path / "other")]
    assert float(differing["eval_loss"]["then"]) == pytest.approx(metrics[0]["eval_loss"], rel=1e-8)
    assert float(differing["eval_loss"]["now"]) == pytest.approx(metrics[1]["eval_loss"], rel=1e-8)
    assert not any(name.endswith(CLOCK) for name in differing)


def test_data_that_are_gone_are_an_error(original: FinishedRun, tmp_path: Path) -> None:
    (tmp_path / "rows" / "val.jsonl").unlink()
    with pytest.raises(UserError, match=r"val\.jsonl: is gone"):
        reproduce(original.folder, None, anyway=False)


def test_other_versions_are_told_and_are_no_error(
    original: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = original.results.run
    facts["versions"]["torch"], facts["device"]["name"], facts["base"]["xxh3"] = "2.0.0", "Z80", "f" * 32
    (original.folder / "run.json").write_text(json.dumps(facts))
    capsys.readouterr()
    assert reproduce(original.folder, tmp_path / "again", anyway=False) == 0
    said = capsys.readouterr().out
    assert said.index("2.0.0") < said.index("machine")
    assert said.index("Z80") < said.index("step")
    names = [each["name"] for each in json.loads((tmp_path / "again" / RECORD).read_text())["inputs"]]
    assert names == ["torch", "device name", "base xxh3"]


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"status": "failed", "error": "x"}, "is failed, so there is nothing to compare with"),
        ({"status": "finished"}, "of an earlier version"),
        (None, "holds no run"),
    ],
)
def test_what_cannot_be_reproduced_is_told_as_such(tmp_path: Path, facts: Any, told: str) -> None:
    if facts is not None:
        (tmp_path / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=told):
        reproduce(tmp_path, None, anyway=False)


def test_an_adapter_of_other_bits_is_described(finished: Finished) -> None:
    one, other = finished("recipe=sft", "quant=none", *SHORT), finished(*OTHER_SEED)
    assert outcome(one.folder, one.folder).same
    found = outcome(one.folder, other.folder)
    assert "differs in 28 of 28 tensors, by up to" in found.adapter
    assert not found.same
