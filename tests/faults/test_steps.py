"""Steps that ruin or teach nothing end the run before they count, with the rows that they were made of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp.errors import UserError
from lora_exp.training.checkpoints import newest_checkpoint
from tests.faults.harness import Tally
from tests.runs import build_trainer, run_in

QUICK = [
    "tracker=none", "trainer=cpu", "samples.num_prompts=0", "recipe.max_length=64", "trainer.eval_strategy=no",
    "trainer.logging_steps=1", "trainer.per_device_train_batch_size=2", "trainer.bf16=false",
]  # fmt: skip
ENGINES = ["packed", "padded"]


def trainer_of(folder: Path, *overrides: str) -> Any:
    return build_trainer(folder, [*QUICK, *overrides])


def named(error: UserError) -> set[int]:
    """Return the rows that an error names, having checked that each stands at its line of the packaged file."""
    found = {}
    for problem in error.problems:
        if place := re.fullmatch(r"pkg://lora_exp\.data\.sample/(train.*\.jsonl):(\d+)", problem.where):
            found[int(problem.what.removeprefix("row "))] = int(place[2])
    assert all(line == row + 1 for row, line in found.items()), "the packaged files have no blank lines"
    return set(found)


def rows_of_batches(trainer: Any, recipe: str) -> list[int]:
    """Return the rows of the first step, found as the trainer itself draws them."""
    data = trainer.rows.data.datasets["train"]
    sampler = iter(trainer.get_train_dataloader().batch_sampler)
    size = trainer.args.gradient_accumulation_steps
    return [data[index]["row"] for _ in range(size) for index in next(sampler)]


def spoil(trainer: Any, at_step: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have TRL's own loss come out changed from a step on."""
    original = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(*args, **kwargs)
        return change(loss) if trainer.model.training and trainer.state.global_step + 1 >= at_step else loss

    trainer.compute_loss = compute_loss


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("NaN loss", lambda loss: loss * float("nan"), "its loss is nan"),
        pytest.param("infinite loss", lambda loss: loss + float("inf"), "its loss is inf", marks=pytest.mark.faults),
    ],
)
def test_a_loss_that_is_no_number_ends_the_run_with_its_rows(
    tmp_path: Path, tally: Tally, engine: str, recipe: str, kind: str, change: Any, said: str
) -> None:
    accumulate = ["trainer.gradient_accumulation_steps=2", "trainer.max_steps=5"]
    trainer = trainer_of(tmp_path, f"engine={engine}", f"recipe={recipe}", *accumulate)
    expected = rows_of_batches(trainer, recipe)
    before = {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}
    spoil(trainer, 1, change)
    tally.inject(kind)
    with pytest.raises(UserError, match=said) as caught:
        trainer.train()
    assert "step 1 cannot be learned from" in str(caught.value)
    assert named(caught.value) == set(expected)
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], each) for name, each in before.items()), "the step must not count"
    tally.survive(kind)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_is_no_number_ends_the_run_and_the_checkpoint_stays(
    tmp_path: Path, tally: Tally, engine: str
) -> None:
    class Ruined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("inf")

    trainer = trainer_of(
        tmp_path, f"engine={engine}", "trainer.max_steps=5", "trainer.save_strategy=steps", "trainer.save_steps=2"
    )
    spoil(trainer, 4, Ruined.apply)
    tally.inject("infinite gradient")
    with pytest.raises(UserError, match=r"step 4 cannot be learned from: its loss is \d.*gradient (nan|inf)"):
        trainer.train()
    found = newest_checkpoint(tmp_path / "checkpoints")
    assert found.checkpoint is not None
    assert found.checkpoint.name == "checkpoint-2"
    assert not found.damaged
    tally.survive("infinite gradient")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_likelihood_of_exactly_0_is_no_number_to_log(tmp_path: Path, tally: Tally, engine: str) -> None:
    trainer = trainer_of(tmp_path, f"engine={engine}", "trainer.max_steps=2")
    spoil(trainer, 2, lambda loss: loss * 0)
    tally.inject("loss of exactly 0")
    with pytest.raises(UserError, match="step 2 cannot be learned from: its loss is exactly 0") as caught:
        trainer.train()
    assert len(named(caught.value)) == 2
    tally.survive("loss of exactly 0")


def test_a_hinge_loss_of_0_is_right(tmp_path: Path) -> None:
    """Every margin is beyond 1 there: nothing is left to learn from the batch, and nothing is wrong with it."""
    trainer = trainer_of(tmp_path, "recipe=dpo", "recipe.loss_type=hinge", "trainer.max_steps=2")
    spoil(trainer, 1, lambda loss: loss * 0)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_without_a_scored_token_is_an_error(tmp_path: Path, tally: Tally, engine: str) -> None:
    trainer = trainer_of(tmp_path, f"engine={engine}", "trainer.max_steps=2")
    labels = trainer.train_dataset["labels"]
    unscored = [[-100] * len(each) for each in labels]
    trainer.train_dataset = trainer.train_dataset.remove_columns("labels").add_column("labels", unscored)
    tally.inject("no scored token")
    with pytest.raises(UserError, match="no token of it is scored") as caught:
        trainer.train()
    assert len(named(caught.value)) == 2
    tally.survive("no scored token")


def test_a_learning_rate_that_ruins_the_model_ends_the_run(tmp_path: Path, tally: Tally) -> None:
    """Nothing is put in here: the weights really run away."""
    tally.inject("weights that run away")
    runaway = [
        "trainer.learning_rate=1e30",
        "trainer.warmup_steps=0",
        "trainer.max_steps=20",
        "trainer.save_strategy=no",
    ]
    with pytest.raises(UserError, match="cannot be learned from"):
        run_in(tmp_path, [*QUICK, "recipe=sft", *runaway])
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["status"] == "failed"
    assert "cannot be learned from" in facts["error"]
    tally.survive("weights that run away")


def test_blank_lines_do_not_shift_the_lines_that_are_named(tmp_path: Path, record: Any) -> None:
    from lora_exp.training.watch import line_numbers

    file = tmp_path / "rows.jsonl"
    file.write_text("\n{}\n\n\n{}\n{}")
    assert line_numbers(str(file)) == [2, 5, 6]
    assert line_numbers("some/dataset[train]") == []
