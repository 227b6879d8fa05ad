"""The jobs of one multirun are separate runs: folders, trackers, memory, failures."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.few import ROWS
from tests.forked import ForkServer

JOB = ["trainer.max_steps=2", "trainer.logging_steps=1", "samples.num_prompts=1", "samples.max_new_tokens=4", *ROWS]


def offline_records(folder: Path) -> list[Any]:
    """Read an offline W&B run back: a LevelDB log (32 KiB blocks, 7-byte headers) of wandb's own protobuf records."""
    from wandb.proto import wandb_internal_pb2

    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    data, at, parts, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left_in_block = 32768 - at % 32768
        if left_in_block < 7:
            at += left_in_block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def summary_of(record: Any) -> list[str]:
    if not record.HasField("summary"):
        return []
    return [item.key or ".".join(item.nested_key) for item in record.summary.update]


def logged_keys(records: list[Any]) -> set[str]:
    items = [item for record in records if record.HasField("history") for item in record.history.item]
    return {item.key or ".".join(item.nested_key) for item in items}


@pytest.fixture(scope="module")
def sweep(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str]:
    cwd = tmp_path_factory.mktemp("sweep")
    grid = ["recipe=dpo", "recipe.beta=0.05,0.1", "recipe.max_length=96,128"]
    done = fork_server.run("-m", *grid, *JOB, cwd=cwd, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    return sorted(path.parent for path in cwd.glob("multirun/*/*/*/run.json")), done.stdout + done.stderr


def test_four_jobs_make_four_whole_folders(sweep: tuple[list[Path], str]) -> None:
    folders, _ = sweep
    configs = [(folder / "config.yaml").read_text() for folder in folders]
    assert len(folders) == 4
    assert len(set(configs)) == 4
    assert all(json.loads((folder / "run.json").read_text())["status"] == "finished" for folder in folders)
    assert all((folder / "adapter" / "adapter_model.safetensors").exists() for folder in folders)


def test_four_jobs_make_four_wandb_runs_of_one_group(sweep: tuple[list[Path], str]) -> None:
    folders, _ = sweep
    runs, betas, exits, swept, summaries = [], [], [], [], set()
    for folder in folders:
        records = offline_records(folder)
        run = next(record.run for record in records if record.HasField("run"))
        runs.append(run)
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        betas.append(config["recipe"]["beta"])
        swept.append((config["sweep/recipe.beta"], config["sweep/recipe.max_length"]))
        summaries |= {name for record in records for name in summary_of(record)}
        exits.append(next(record.exit.exit_code for record in records if record.HasField("exit")))
        shown = {"train/loss", "train/rewards/margins", "eval/loss", "train/global_step"}
        assert shown | {"samples"} <= {key.split(".")[0] for key in logged_keys(records)}
    assert len({run.run_id for run in runs}) == 4
    assert len({run.run_group for run in runs}) == 1
    assert {run.job_type for run in runs} == {"dpo"}
    assert len({run.display_name for run in runs}) == 4
    assert sorted(betas) == [0.05, 0.05, 0.1, 0.1]
    assert sorted(swept) == [(0.05, 96), (0.05, 128), (0.1, 96), (0.1, 128)]
    assert {"objective", "status"} <= summaries
    assert exits == [0, 0, 0, 0]


def test_what_the_user_sees_has_no_warning(sweep: tuple[list[Path], str]) -> None:
    _, output = sweep
    assert "Warning" not in output
    assert "[INFO]" not in output
    assert "kernels" not in output


def test_memory_does_not_grow_from_job_to_job(fork_server: ForkServer, tmp_path: Path) -> None:
    """Peak of each job by its own counter; the first two pay for imports and allocator pools."""
    betas = "recipe.beta=" + ",".join(f"0.{digit}" for digit in range(1, 9))
    done = fork_server.run("-m", "recipe=dpo", betas, "tracker=none", "recipe.max_length=256", *JOB, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = sorted(tmp_path.glob("multirun/*/*/*/run.json"))
    peaks = [json.loads(path.read_text())["peak_memory_bytes"] for path in folders]
    assert len(peaks) == 8
    assert max(peaks[4:]) < 1.05 * max(peaks[1:4]), peaks


def test_nothing_of_a_job_is_alive_after_it(tmp_path: Path) -> None:
    import gc

    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    from tests.runs import run_in

    overrides = ["tracker=none", "recipe=dpo", *JOB]

    def tensors_alive() -> int:
        """Count them, but for those without numbers: the estimate's, which later jobs use again."""
        gc.collect()
        kinds = [type(each) for each in gc.get_objects()]
        return sum(issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor) for kind in kinds)

    environment = dict(os.environ)
    run_in(tmp_path / "0", overrides)
    before = tensors_alive()
    run_in(tmp_path / "1", [*overrides, "trainer.bf16=false"])
    assert tensors_alive() <= before
    assert dict(os.environ) == environment


def test_a_job_that_fails_spares_the_rest_and_exits_2(fork_server: ForkServer, tmp_path: Path) -> None:
    done = fork_server.run("-m", "data.train_file=null,missing.jsonl", "tracker=none", *JOB, cwd=tmp_path)
    assert done.returncode == 2
    assert "missing.jsonl: there is no such file" in done.stderr
    assert "Traceback" not in done.stderr
    statuses = [json.loads(path.read_text())["status"] for path in sorted(tmp_path.glob("multirun/*/*/*/run.json"))]
    assert sorted(statuses) == ["failed", "finished"]


def test_fail_fast_stops_at_the_first(fork_server: ForkServer, tmp_path: Path) -> None:
    done = fork_server.run(
        "-m", "data.train_file=missing.jsonl,null", "sweep.fail_fast=true", "tracker=none", *JOB, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: the sweep stops at its first failed trial: sweep.fail_fast=true"
    (run,) = tmp_path.glob("multirun/*/*/*/run.json")
    assert json.loads(run.read_text())["status"] == "failed"


def test_a_failed_run_is_a_failed_wandb_run(fork_server: ForkServer, tmp_path: Path) -> None:
    done = fork_server.run(
        "+trainer.optim_args=nonsense", "recipe=sft", *JOB, f"output_dir={tmp_path}/run", cwd=tmp_path
    )
    assert done.returncode != 0
    exits = [record.exit.exit_code for record in offline_records(tmp_path / "run") if record.HasField("exit")]
    assert exits == [1]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_tracker_that_fails_does_not_end_the_run(fork_server: ForkServer, tmp_path: Path) -> None:
    done = fork_server.run("tracker.mode=online", *JOB, "output_dir=run", cwd=tmp_path, WANDB_BASE_URL="not a url")
    assert done.returncode == 0, done.stderr
    assert "wandb failed" in done.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
