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
from tests.few import ROWS
from tests.runs import build_trainer, run_in

QUICK = [
    "tracker=none", "trainer=cpu", "samples.num_prompts=0", "recipe.max_length=64", "trainer.eval_strategy=no",
    "trainer.logging_steps=1", "trainer.per_device_train_batch_size=2", "trainer.bf16=false", *ROWS,
]  # fmt: skip
ENGINES = ["packed", "padded"]
FOLDER = ROWS[-1].removeprefix("data.splits_dir=")


def trainer_of(folder: Path, *overrides: str) -> Any:
    return build_trainer(folder, [*QUICK, *overrides])


def named(error: UserError, folder: str = FOLDER) -> set[int]:
    """Return the rows that an error names, having checked that each stands at its line of a file in this folder."""
    found = {}
    for problem in error.problems:
        if place := re.fullmatch(re.escape(folder) + r"/(train.*\.jsonl):(\d+)", problem.where):
            found[int(problem.what.removeprefix("row "))] = int(place[2])
    assert all(line == row + 1 for row, line in found.items()), "the files have no blank lines"
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


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_rows_of_a_package_are_named_by_their_package(tmp_path: Path, recipe: str) -> None:
    folder = "pkg://lora_exp.data.sample"
    trainer = trainer_of(tmp_path, f"recipe={recipe}", f"data.splits_dir={folder}", "trainer.max_steps=5")
    expected = rows_of_batches(trainer, recipe)
    spoil(trainer, 1, lambda loss: loss * float("nan"))
    with pytest.raises(UserError, match="its loss is nan") as caught:
        trainer.train()
    assert named(caught.value, folder) == set(expected)


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
    """Every margin is beyond 1 from the second step on: nothing is left to learn, and nothing is wrong."""
    trainer = trainer_of(tmp_path, "recipe=dpo", "recipe.loss_type=hinge", "trainer.max_steps=5")
    spoil(trainer, 2, lambda loss: loss * 0)
    trainer.train()
    assert trainer.state.global_step == 5


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


# A run that learns nothing, and one that does not start where it should.

DPO = ["recipe=dpo", "recipe.max_length=512"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("steps", "seen"), [(1, 1), (2, 2), (5, 3)])
def test_a_run_whose_gradients_are_all_0_ends(tmp_path: Path, engine: str, steps: int, seen: int) -> None:
    trainer = trainer_of(tmp_path, *DPO, f"engine={engine}", f"trainer.max_steps={steps}")
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    with pytest.raises(UserError, match=f"every gradient was exactly 0 in {seen} step") as caught:
        trainer.train()
    assert trainer.state.global_step == seen - 1
    assert "lora.target_modules" in str(caught.value)


@pytest.mark.parametrize("step", [0, 2], ids=["the first step", "the third step"])
def test_a_gradient_in_one_of_the_first_steps_is_enough(tmp_path: Path, step: int) -> None:
    """Later steps may have none, such as those of the hinge loss beyond its margin."""
    trainer = trainer_of(tmp_path, *DPO, "trainer.max_steps=5")
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            parameter.register_hook(lambda grad: grad * (trainer.state.global_step == step))
    trainer.train()
    assert trainer.state.global_step == 5


def test_an_activated_adapter_whose_tokens_never_occur_does_not_finish(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is learned"):
        run_in(tmp_path / "run", [*QUICK, "+lora.alora_invocation_tokens=[9999]", "trainer.max_steps=2"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def shift_reference(trainer: Any, by: float) -> None:
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        column = [value + by for value in trainer.train_dataset[name]]
        trainer.train_dataset = trainer.train_dataset.remove_columns(name).add_column(name, column)


STARTS = [
    ("new adapter", []),
    ("new adapter with dropout", ["recipe.disable_dropout=false", "lora.lora_dropout=0.1"]),
    ("DoRA", ["lora=dora"]),
    ("DoRA in bf16", ["lora=dora", "trainer.bf16=true"]),
    ("PiSSA", ["lora=pissa"]),
    ("8 bits", ["quant=8bit"]),
    ("4 bits in bf16", ["quant=4bit", "trainer.bf16=true"]),
]


@pytest.mark.parametrize(("name", "overrides"), STARTS, ids=[name for name, _ in STARTS])
def test_a_policy_that_starts_at_its_reference_trains(tmp_path: Path, name: str, overrides: list[str]) -> None:
    trainer = trainer_of(tmp_path, *DPO, "trainer.max_steps=1", *overrides)
    assert trainer.starts_alike
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(("dtype", "by"), [("false", 0.005), ("true", 20.0)])
def test_a_policy_that_does_not_start_at_its_reference_ends_the_run(tmp_path: Path, dtype: str, by: float) -> None:
    trainer = trainer_of(tmp_path, *DPO, "trainer.max_steps=3", f"trainer.bf16={dtype}")
    shift_reference(trainer, by)
    with pytest.raises(UserError, match="do not start alike") as caught:
        trainer.train()
    assert trainer.state.global_step == 0
    assert f"chosen {-0.1 * by:.2g}" in str(caught.value)
    assert "store clear" in str(caught.value)


def test_rounding_of_deep_models_is_no_fault(tmp_path: Path) -> None:
    """30 layers and 256 pairs of answers with three letters differ by 5e-5 nats in float32."""
    trainer = trainer_of(tmp_path, *DPO, "trainer.max_steps=3", "trainer.bf16=false")
    shift_reference(trainer, 5e-4)
    trainer.train()
    assert trainer.state.global_step == 3
    assert not trainer._first, "the batches of the first step are let go of"


def test_the_difference_that_is_told_is_beyond_the_bound_that_is_told(tmp_path: Path) -> None:
    """The bound grows with an answer's log-probability; here the shortest answer alone is wrong, by a little."""
    all_rows = ["trainer.per_device_train_batch_size=24", "trainer.max_steps=3"]
    trainer = trainer_of(tmp_path, *DPO, *all_rows, "trainer.bf16=true", "recipe.beta=1.0")
    known = trainer.train_dataset["ref_chosen_logps"]
    least = max(range(len(known)), key=lambda row: known[row])
    moved = [value + 0.05 * (row == least) for row, value in enumerate(known)]
    trainer.train_dataset = trainer.train_dataset.remove_columns("ref_chosen_logps").add_column(
        "ref_chosen_logps", moved
    )
    with pytest.raises(UserError, match="do not start alike") as caught:
        trainer.train()
    told = re.search(r"chosen (\S+), rejected (\S+) in step 1, and 0 within (\S+) is due", str(caught.value))
    assert told is not None
    chosen, rejected, due = map(float, told.groups())
    assert chosen == pytest.approx(-0.05, rel=0.5)
    assert abs(chosen) > due
    assert abs(rejected) <= due


@pytest.mark.parametrize("dtype", ["false", "true"])
def test_references_of_other_rows_are_noticed_where_the_mean_is_right(tmp_path: Path, dtype: str) -> None:
    trainer = trainer_of(
        tmp_path, *DPO, "trainer.max_steps=3", f"trainer.bf16={dtype}", "trainer.gradient_accumulation_steps=2"
    )
    known = trainer.train_dataset["ref_chosen_logps"]
    other = [value + (5.0 if number % 2 else -5.0) for number, value in enumerate(known)]
    trainer.train_dataset = trainer.train_dataset.remove_columns("ref_chosen_logps").add_column(
        "ref_chosen_logps", other
    )
    trainer._get_train_sampler = lambda *_: range(len(other))  # two rows a batch, in which the changes cancel
    with pytest.raises(UserError, match="do not start alike"):
        trainer.train()


def test_a_base_in_float32_that_is_rounded_to_bf16_is_noticed(tmp_path: Path) -> None:
    """The size of fault that this check is for: one layer of the policy computes in fewer bits than the reference."""
    trainer = trainer_of(tmp_path, *DPO, "trainer.max_steps=3", "quant=8bit")
    layer = next(each for each in trainer.model.modules() if hasattr(each, "lora_A"))
    layer.base_layer.register_forward_hook(lambda *given: given[2].bfloat16().to(given[2].dtype))
    trainer.packed_forward.norms, trainer.packed_forward.mlps = [], []
    with pytest.raises(UserError, match="do not start alike"):
        trainer.train()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_that_starts_elsewhere_is_not_held_to_the_reference(tmp_path: Path, engine: str) -> None:
    trainer = trainer_of(tmp_path, *DPO, f"engine={engine}", "lora.init_lora_weights=false", "trainer.max_steps=2")
    assert not trainer.starts_alike
    trainer.train()
    assert not trainer._first


def test_a_first_loss_that_is_no_number_is_not_laid_to_the_reference(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, *DPO, "trainer.max_steps=3")
    shift_reference(trainer, float("nan"))
    with pytest.raises(UserError, match="its loss is nan"):
        trainer.train()


def opt(folder: Path, dropout: float) -> list[str]:
    """Write a small model whose dropout is a number in its code and no layer; return the overrides that load it."""
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer = trainer_of(folder / "tokenizer", "trainer.max_steps=1").processing_class
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=512, dropout=dropout,
    )  # fmt: skip
    for each in (OPTForCausalLM(config), tokenizer):
        each.save_pretrained(folder / "opt")
    return ["model=custom", f"model.pretrained_model_name_or_path={folder / 'opt'}"]


def test_a_model_that_drops_at_random_is_not_held_to_the_reference(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", *DPO, "trainer.max_steps=1", *opt(tmp_path, 0.3))
    batch = next(iter(trainer.get_train_dataloader()))
    state = torch.get_rng_state()
    trainer.model.train()
    assert trainer._computes_at_random(batch)
    assert torch.equal(torch.get_rng_state(), state), "the check costs no random number"
    trainer.train()


def test_a_model_that_does_not_is(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", *DPO, "trainer.max_steps=1", *opt(tmp_path, 0.0), "engine=packed")
    trainer.model.train()
    assert not trainer._computes_at_random(next(iter(trainer.get_train_dataloader())))
