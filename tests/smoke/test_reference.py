"""The reference of DPO: where it comes from, that it never moves, and that rewards start at 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.few import ROWS
from tests.runs import Finished, build_trainer

SFT = ("recipe=sft", "trainer.max_steps=4", "trainer.learning_rate=1e-2", "samples.num_prompts=0", *ROWS)
CASES = [
    ("new adapter", ()),
    ("new adapter", ("quant=8bit",)),
    ("new adapter", ("quant=4bit",)),
    ("trained adapter", ()),
    ("trained adapter", ("quant=8bit",)),
    ("trained adapter", ("quant=4bit",)),
    ("pissa", ("lora=pissa",)),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " ".join([case[0], *case[1]]))
def trainer(request: pytest.FixtureRequest, finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a trainer of each case; the last test that has it trains it."""
    return build_trainer(tmp_path_factory.mktemp("run"), overrides_of(request.param, finished))


def overrides_of(case: tuple[str, tuple[str, ...]], finished: Finished) -> list[str]:
    start, overrides = case
    adapter = [f"model.adapter={finished(*SFT).folder}"] if start == "trained adapter" else []
    return [
        "recipe=dpo",
        "tracker=none",
        "trainer.learning_rate=1e-2",
        "trainer.max_steps=3",
        *ROWS,
        *adapter,
        *overrides,
    ]


def reference_logps(trainer: Any) -> torch.Tensor:
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer.model.eval()
    return torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))


REWARDS = ("eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins")


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join([case[0], *case[1]]))
def test_at_step_0_trls_rewards_are_exactly_0(case: Any, finished: Finished, tmp_path: Path) -> None:
    """Policy and reference are computed from the same padded batch."""
    metrics = build_trainer(tmp_path, ["engine=padded", *overrides_of(case, finished)]).evaluate()
    assert [metrics[name] for name in REWARDS] == [0, 0, 0]


def test_at_step_0_packed_rewards_are_0_but_for_rounding(trainer: Any) -> None:
    """The kept reference was computed beside other rows: sums are rounded otherwise."""
    metrics = trainer.evaluate()
    assert [metrics[name] for name in REWARDS] == pytest.approx([0, 0, 0], abs=1e-5)


def test_there_is_one_base(trainer: Any) -> None:
    """A reference costs an adapter at most, never a second copy of the base."""
    assert trainer.ref_model is None
    base = [name for name, _ in trainer.model.named_parameters() if "embed_tokens" in name]
    assert len(base) == 1


def test_training_does_not_move_the_reference(trainer: Any) -> None:
    before = reference_logps(trainer)
    trainer.train()
    assert torch.equal(reference_logps(trainer), before)
    rewards = trainer.evaluate()
    assert rewards["eval_rewards/margins"] != 0


def test_a_pissa_reference_is_the_model_that_one_started_from(tmp_path: Path) -> None:
    """With its adapter off a PiSSA base lacks what the adapter took; the start adapter has it."""
    overrides = ["recipe=dpo", "tracker=none", "trainer.bf16=false", *ROWS]
    plain = build_trainer(tmp_path / "plain", overrides)
    pissa = build_trainer(tmp_path / "pissa", [*overrides, "lora=pissa"])
    torch.testing.assert_close(reference_logps(pissa), reference_logps(plain), rtol=1e-4, atol=1e-3)


def test_an_answer_that_is_stored_keeps_its_value_where_the_other_of_its_pair_is_computed(tmp_path: Path) -> None:
    """Computed again beside other rows it is rounded otherwise, and what is stored is what later runs read."""

    def sums(name: str, max_length: int) -> list[tuple[float, ...]]:
        run = ["recipe=dpo", "tracker=none", f"recipe.max_length={max_length}", f"store.path={tmp_path}/kept.sqlite3"]
        trainer = build_trainer(tmp_path / name, run)
        columns = ("ref_chosen_logps", "ref_rejected_logps")
        return [tuple(row[column] for column in columns) for row in trainer.train_dataset]

    sums("other", 256)
    assert sums("computes", 192) == sums("reads", 192)
