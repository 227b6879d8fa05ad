"""The best checkpoint, and going on after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_exp.errors import UserError
from lora_exp.training.integrity import damage
from tests.few import ROWS
from tests.runs import run_in

QUICK = ["tracker=none", "recipe=sft", "samples.num_prompts=0", "trainer.logging_steps=1", *ROWS]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return tensors


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_run_ends_with_the_best_checkpoint_not_the_last(tmp_path: Path) -> None:
    # With the highest loss as "best", the best is an early checkpoint for as long as training helps at all.
    run = run_in(
        tmp_path / "run",
        [
            *QUICK, "trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=eval_loss",
            "trainer.greater_is_better=true", "trainer.eval_strategy=steps", "trainer.eval_steps=3",
            "trainer.save_strategy=steps", "trainer.save_steps=3", "trainer.save_total_limit=null",
            "trainer.max_steps=9", "trainer.learning_rate=0.1",
        ],
    )  # fmt: skip
    evaluations = {line["step"]: line["eval_loss"] for line in reversed(run.results.steps) if "eval_loss" in line}
    best = max(evaluations, key=lambda step: evaluations[step])
    assert best != 9, "the last checkpoint must not be the best for this test to mean anything"
    assert run.results.run["best_checkpoint"].endswith(f"checkpoint-{best}")
    assert same(adapter(run.folder / "adapter"), adapter(run.folder / "checkpoints" / f"checkpoint-{best}"))
    assert run.results.metrics["eval_loss"] == pytest.approx(evaluations[best], rel=1e-6)


def test_the_checkpoint_of_an_epochs_last_step_holds_the_epochs_evaluation(tmp_path: Path) -> None:
    schedule = ["trainer.eval_strategy=epoch", "trainer.save_strategy=steps", "trainer.save_steps=3"]
    run = run_in(tmp_path / "run", [*QUICK, *schedule, "trainer.num_train_epochs=2", "trainer.save_total_limit=null"])
    evaluated = [line["step"] for line in run.results.steps if "eval_loss" in line and line["step"]]
    saved = {int(path.name.partition("-")[2]): path for path in (run.folder / "checkpoints").iterdir()}
    assert set(evaluated) <= saved.keys(), "the two must meet for this test to mean anything"
    for step, folder in saved.items():
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        known = [line["step"] for line in history if "eval_loss" in line and line["step"]]
        assert known == [each for each in evaluated if each <= step]


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    schedule = [
        "trainer.max_steps=6",
        "trainer.save_strategy=steps",
        "trainer.save_steps=3",
        "trainer.eval_strategy=no",
    ]
    whole = run_in(tmp_path / "whole", [*QUICK, *schedule])
    broken = run_in(tmp_path / "broken", [*QUICK, *schedule])
    # As if it had been killed after step 4: the last checkpoint and the result are not there yet.
    shutil.rmtree(broken.folder / "checkpoints" / "checkpoint-6")
    resumed = run_in(broken.folder, [*QUICK, *schedule, f"resume={broken.folder}"])

    assert same(adapter(resumed.folder / "adapter"), adapter(whole.folder / "adapter"))
    losses = [
        [(line["step"], line["loss"]) for line in run.results.steps if "loss" in line] for run in (whole, resumed)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[1]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("steps", [6, 5], ids=["at the end of an epoch", "within one"])
def test_a_run_resumed_after_its_last_step_has_the_summary_of_the_whole_one(tmp_path: Path, steps: int) -> None:
    """TRL adds its means to the summary where no evaluation came last."""
    schedule = [f"trainer.max_steps={steps}", "trainer.save_strategy=steps", "trainer.save_steps=1"]
    schedule += ["trainer.eval_strategy=steps", f"trainer.eval_steps={steps}", "trainer.logging_steps=10"]
    whole = run_in(tmp_path / "run", [*QUICK, *schedule])
    shutil.rmtree(whole.folder / "adapter")
    resumed = run_in(whole.folder, [*QUICK, *schedule, f"resume={whole.folder}"])
    summaries = [next(line for line in run.results.steps if "train_loss" in line) for run in (whole, resumed)]
    assert summaries[0].keys() == summaries[1].keys()


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = [
        "trainer.max_steps=6",
        "trainer.save_strategy=steps",
        "trainer.save_steps=2",
        "trainer.eval_strategy=no",
    ]
    whole = run_in(tmp_path / "whole", [*QUICK, *schedule])
    broken = run_in(tmp_path / "broken", [*QUICK, *schedule])
    checkpoints = broken.folder / "checkpoints"
    optimizer = checkpoints / "checkpoint-6" / "optimizer.pt"
    data = bytearray(optimizer.read_bytes())
    data[len(data) // 2] ^= 1
    optimizer.write_bytes(data)
    capsys.readouterr()
    resumed = run_in(broken.folder, [*QUICK, *schedule, f"resume={broken.folder}"])

    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-6 is damaged: optimizer.pt is not what was written; going on from" in said
    assert same(adapter(resumed.folder / "adapter"), adapter(whole.folder / "adapter"))
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-4", "checkpoint-6", "damaged-checkpoint-6"}
    assert damage(checkpoints / "checkpoint-6") is None


def test_a_finished_run_without_a_checkpoint_cannot_be_resumed(tmp_path: Path) -> None:
    run = run_in(
        tmp_path / "run", [*QUICK, "trainer.max_steps=1", "trainer.save_strategy=no", "trainer.eval_strategy=no"]
    )
    with pytest.raises(UserError, match="no checkpoint to go on from"):
        run_in(run.folder, [*QUICK, f"resume={run.folder}"])
    assert json.loads((run.folder / "run.json").read_text())["status"] == "finished"


def test_a_run_is_not_resumed_as_something_else(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", [*QUICK, "trainer.max_steps=1", "trainer.eval_strategy=no"])
    with pytest.raises(UserError) as caught:
        run_in(run.folder, [*QUICK, "lora.r=8", "seed=7", "trainer.max_steps=2", f"resume={run.folder}"])
    assert [problem.where for problem in caught.value.problems] == ["lora.r", "seed"]
    assert json.loads((run.folder / "run.json").read_text())["status"] == "finished"
