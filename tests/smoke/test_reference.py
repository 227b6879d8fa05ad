"""The reference of DPO: where it comes from, that it never moves, and that rewards start at exactly 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import Finished, build_trainer

SFT = ("recipe=sft", "trainer.max_steps=4", "trainer.learning_rate=1e-2", "samples.num_prompts=0")
CASES = [
    ("new adapter", ()),
    ("new adapter", ("quant=8bit",)),
    ("new adapter", ("quant=4bit",)),
    ("trained adapter", ()),
    ("trained adapter", ("quant=8bit",)),
    ("trained adapter", ("quant=4bit",)),
    ("pissa", ("lora=pissa",)),
]


@pytest.fixture(params=CASES, ids=lambda case: " ".join([case[0], *case[1]]))
def trainer(request: pytest.FixtureRequest, finished: Finished, tmp_path: Path) -> Any:
    start, overrides = request.param
    adapter = [f"model.adapter={finished(*SFT).folder}"] if start == "trained adapter" else []
    return build_trainer(
        tmp_path,
        ["recipe=dpo", "tracker=none", "trainer.learning_rate=1e-2", "trainer.max_steps=3", *adapter, *overrides],
    )


def reference_logps(trainer: Any) -> torch.Tensor:
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    return torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))


def test_at_step_0_every_reward_is_exactly_0(trainer: Any) -> None:
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/chosen"] == 0
    assert metrics["eval_rewards/rejected"] == 0
    assert metrics["eval_rewards/margins"] == 0


def test_training_does_not_move_the_reference(trainer: Any) -> None:
    before = reference_logps(trainer)
    trainer.train()
    assert torch.equal(reference_logps(trainer), before)
    rewards = trainer.evaluate()
    assert rewards["eval_rewards/margins"] != 0


def test_there_is_one_base(trainer: Any) -> None:
    """A reference costs an adapter at most, never a second copy of the base."""
    assert trainer.ref_model is None
    base = [name for name, _ in trainer.model.named_parameters() if "embed_tokens" in name]
    assert len(base) == 1


def test_a_pissa_reference_is_the_model_that_one_started_from(tmp_path: Path) -> None:
    """With its adapter off a PiSSA base lacks what the adapter took; the start adapter has it."""
    overrides = ["recipe=dpo", "tracker=none", "trainer.bf16=false"]
    plain = build_trainer(tmp_path / "plain", overrides)
    pissa = build_trainer(tmp_path / "pissa", [*overrides, "lora=pissa"])
    torch.testing.assert_close(reference_logps(pissa), reference_logps(plain), rtol=1e-4, atol=1e-3)
