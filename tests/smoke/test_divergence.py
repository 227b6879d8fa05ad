"""What compares DPO trials of different beta: divergence from the reference, and how far log-probabilities moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_exp.recipes.divergence import ROWS
from tests.runs import build_trainer

RUN = [
    "recipe=dpo", "tracker=none", "trainer.bf16=false", "trainer.max_steps=3", "trainer.learning_rate=5e-3",
    "samples.num_prompts=0", "recipe.max_length=96", "trainer.eval_on_start=true",
]  # fmt: skip


@pytest.fixture(scope="module", params=["packed", "padded"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    built = build_trainer(tmp_path_factory.mktemp("run"), [*RUN, f"engine={request.param}"])
    built.train()
    return built


def evaluations(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "eval_loss" in line]


def test_a_policy_that_has_not_moved_is_at_no_distance(trainer: Any) -> None:
    first = evaluations(trainer)[0]
    assert first["step"] == 0
    assert first["eval_kl/chosen"] == first["eval_logp_shift/chosen"] == first["eval_logp_shift/rejected"] == 0


def test_the_divergence_is_that_of_the_two_distributions(trainer: Any) -> None:
    model = trainer.model.eval()
    sums, tokens = 0.0, 0
    for row in trainer.eval_dataset.select(range(min(ROWS, len(trainer.eval_dataset)))):
        ids = torch.tensor([[*row["prompt_ids"], *row["chosen_ids"]]])
        answer = slice(len(row["prompt_ids"]) - 1, -1)
        with torch.no_grad():
            policy = model(input_ids=ids).logits[0, answer]
            with model.disable_adapter():
                reference = model(input_ids=ids).logits[0, answer]
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=policy), torch.distributions.Categorical(logits=reference)
        )
        sums, tokens = sums + float(divergence.sum()), tokens + len(divergence)
    found = evaluations(trainer)[-1]["eval_kl/chosen"]
    assert found > 0
    assert found == pytest.approx(sums / tokens, rel=1e-4)


def test_the_shift_is_the_reward_without_beta(trainer: Any) -> None:
    last = evaluations(trainer)[-1]
    first = evaluations(trainer)[0]
    for side in ("chosen", "rejected"):
        assert last[f"eval_logp_shift/{side}"] * trainer.beta == pytest.approx(last[f"eval_rewards/{side}"])
        moved = last[f"eval_logps/{side}"] - first[f"eval_logps/{side}"]
        assert last[f"eval_logp_shift/{side}"] == pytest.approx(moved, rel=1e-3, abs=1e-3)
