"""A dry run: schedule, speed, what is printed, what it exits with, and that it leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.cli import prepare
from lora_exp.errors import UserError
from lora_exp.preflight import calibration
from lora_exp.preflight.calibration import Speed, keep_speed, kind_of, known_speed, measured_speed, speed_from_gemm
from lora_exp.preflight.schedule import schedule
from lora_exp.validation import validate
from tests.conftest import Command
from tests.runs import composed

TINY = ("model=tiny", "trainer=cpu", "trainer.bf16=false", "tracker=none")


@settings(max_examples=25)
@given(
    st.integers(1, 300),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([-1, 1, 7, 100]),
    st.sampled_from([0.0, 0.05, 0.5, 3.0]),
)
def test_steps_are_those_of_transformers_trainer(
    rows: int, batch: int, accumulated: int, epochs: float, max_steps: int, warmup: float
) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    asked = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulated,
        "num_train_epochs": epochs,
        "max_steps": max_steps,
        "warmup_steps": warmup,
    }
    trainer = validate(composed([f"trainer.{key}={value}" for key, value in asked.items()])).trainer
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", **asked)
    theirs = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=[{"x": 1}] * rows)
    loader = torch.utils.data.DataLoader([0] * rows, batch_size=batch)
    _, per_epoch, _, _, _, _, steps = theirs.set_initial_training_values(arguments, loader)
    found = schedule(trainer, rows, has_eval_rows=True)
    assert (found.steps, found.steps_per_epoch) == (steps, per_epoch)
    assert found.warmup == arguments.get_warmup_steps(steps)
    assert found.batch == batch * accumulated


@pytest.mark.parametrize(
    ("overrides", "evaluations"),
    [
        (["trainer.eval_strategy=epoch"], 3),
        (["trainer.eval_strategy=epoch", "trainer.eval_on_start=true"], 4),
        (["trainer.eval_strategy=steps", "trainer.eval_steps=10"], 8),
        (["trainer.eval_strategy=steps", "trainer.eval_steps=0.5"], 2),
        (["trainer.eval_strategy=no"], 1),
    ],
)
def test_evaluations_are_counted_the_last_one_too(overrides: list[str], evaluations: int) -> None:
    trainer = validate(composed(overrides)).trainer
    assert schedule(trainer, 200, has_eval_rows=True).evaluations == evaluations
    assert schedule(trainer, 200, has_eval_rows=False).evaluations == 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


DEVICE = {"name": "a processor", "threads": 2}


def test_a_speed_is_known_for_its_kind_alone(cache: Path) -> None:
    config = validate(composed(list(TINY)))
    kind = kind_of(config, "packed", "float32", DEVICE)
    assert known_speed(kind) is None
    keep_speed(kind, Speed(100.0, 200.0, 5.0))
    assert known_speed(kind) == Speed(100.0, 200.0, 5.0)
    others = [
        kind_of(config, "padded", "float32", DEVICE),
        kind_of(config, "packed", "bfloat16", DEVICE),
        kind_of(config, "packed", "float32", {**DEVICE, "threads": 4}),
        kind_of(validate(composed([*TINY, "quant=8bit"])), "packed", "float32", DEVICE),
        kind_of(validate(composed([*TINY, "recipe=dpo"])), "packed", "float32", DEVICE),
    ]
    assert len({kind, *others}) == 6
    assert all(known_speed(other) is None for other in others)


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=12))
def test_a_speed_is_the_median_of_the_last_runs(speeds: list[float]) -> None:
    import tempfile
    from statistics import median

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_EXP_CACHE", folder)
        for speed in speeds:
            keep_speed("a kind", Speed(speed, None, 1.0))
        found = known_speed("a kind")
    assert found is not None
    assert found.train == median(speeds[-calibration.KEPT :])
    assert found.evaluate is None


@pytest.mark.parametrize("text", ["", "[]", '{"speeds"'])
def test_a_damaged_calibration_is_none(cache: Path, text: str) -> None:
    cache.mkdir()
    (cache / calibration.FILE).write_text(text)
    assert known_speed("a kind") is None
    keep_speed("a kind", Speed(1.0, None, 0.0))
    assert known_speed("a kind") == Speed(1.0, None, 0.0)


def test_evaluation_is_no_part_of_the_speed_of_training() -> None:
    log = [{"eval_runtime": 2.0}, {"loss": 1.0}, {"eval_runtime": 4.0}]
    found = measured_speed({"train_runtime": 16.0}, log, {"train": 16.0, "model": 3.0, "reference": 9.0}, 500, 60)
    assert found == Speed(train=50.0, evaluate=20.0, other=3.0)
    assert measured_speed({"train_runtime": 0.0}, [], {}, 0, 0) is None


def test_products_alone_give_a_speed() -> None:
    kept, recomputed = (speed_from_gemm(1e12, "packed", 10**8, each) for each in (False, True))
    assert kept.train == pytest.approx(1e12 * calibration.GEMM_SHARE["packed"] / 4e8)
    assert kept.evaluate == recomputed.evaluate == 2 * kept.train
    assert recomputed.train == pytest.approx(kept.train * 2 / 3)


def dry(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Return the exit status of a dry run in an empty folder, which it leaves empty."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        prepare([*arguments, "dry_run=true"])
    assert list(folder.iterdir()) == []
    return int(ended.value.code or 0)


def test_a_dry_run_says_what_a_run_costs_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*TINY, "recipe=dpo", "trainer.gradient_accumulation_steps=2"]
    assert dry(tmp_path / "here", monkeypatch, *overrides) == 0
    said = capsys.readouterr().out
    for part in ("16 rows a step: 2 batches of 8", "45: 3 epochs of 15; warm-up 3", "max_prompt_length", "activations"):
        assert part in said
    assert "no such run was measured here yet" in said
    kinds: dict[str, Any] = {}
    monkeypatch.setattr(
        "lora_exp.preflight.duration.known_speed", lambda kind: kinds.setdefault(kind, Speed(50, 50, 1))
    )
    assert dry(tmp_path / "here", monkeypatch, *overrides) == 0
    assert "50 tokens/s" in capsys.readouterr().out
    assert [json.loads(kind)["recipe"] for kind in kinds] == ["dpo"]


def test_a_multirun_is_a_line_a_trial_and_those_that_do_not_fit_are_marked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_exp.preflight import place
    from lora_exp.reports.console import console

    few = 700 * 2**20
    monkeypatch.setattr(console, "width", 200)
    monkeypatch.setattr(place, "free_memory_bytes", lambda _: few)
    monkeypatch.setattr(place, "_resident", lambda: 0)
    large = "model.embedded.config.intermediate_size=192,200000"
    status = dry(tmp_path / "here", monkeypatch, "-m", *TINY, large, "trainer.max_steps=2")
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines() if line.split()[:1] in (["192"], ["200000"])]
    assert [row[0] for row in rows] == ["192", "200000"]
    assert [" ".join(row[-3:]) == "does not fit" for row in rows] == [False, True]
    assert "2 trials, 1 of them cannot run" in captured.out
    assert "intermediate_size=200000: the run would need about" in captured.err
    assert status == 2


def test_a_dry_run_tells_what_would_stop_the_run(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write_jsonl: Callable[..., Path],
) -> None:
    same = {"prompt": "Where?", "chosen": "a" * 300 + "b", "rejected": "a" * 300 + "c"}
    file = write_jsonl(tmp_path / "rows.jsonl", [same] * 4)
    rows = ["recipe=dpo", "data=splits", f"data.train_file={file}", "trainer.eval_strategy=no"]
    short = ["recipe.max_length=64", "data.max_cut_share=0.5"]
    other = {"prompt": "Where?", "chosen": "b", "rejected": "c"}
    write_jsonl(file, [same] * 4 + [other])
    assert dry(tmp_path / "here", monkeypatch, *TINY, *rows, *short) == 2
    told = capsys.readouterr().err
    assert "4 of 5 rows (80.0%) would be dropped: 4 answers equal after cutting" in told
    assert "recipe.max_length=384 drops 0 of them" in told


def test_a_base_that_is_not_here_is_told_as_in_a_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"lora_exp.fetch model=smollm2_135m"):
        prepare(["model=smollm2_135m", "dry_run=true"])


@pytest.mark.parametrize("mistake", ["recipe.betta=1", "data.splits_dir=nowhere", "data.max_dropped_share=2"])
def test_config_and_data_errors_come_before_torch(command: Callable[..., Command], mistake: str) -> None:
    done = command("dry_run=true", mistake)
    assert done.status == 2
    assert done.stderr.startswith("error: ")
    assert not done.heavy_imports
