"""What TRL computes on our token ids is the published loss, worked out by hand in float64 on the same log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tests.few import ROWS
from tests.runs import build_trainer

FLOAT64 = ["tracker=none", "trainer.bf16=false", *ROWS]


def wide_batch(trainer: Any) -> dict[str, torch.Tensor]:
    """Return a batch of rows of different lengths, with a model in float64 whose adapter does something."""
    trainer.model.double().eval()
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    batch: dict[str, torch.Tensor] = trainer.data_collator([trainer.train_dataset[index] for index in range(5)])
    return batch


def answer_logps(model: Any, ids: torch.Tensor, mask: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Sum the log-probabilities of the scored tokens of each row, from the plain logits."""
    head_off = model.get_base_model() if hasattr(model, "get_base_model") else model
    logits = head_off(input_ids=ids, attention_mask=mask).logits.double()
    logps = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (logps * scored[:, 1:]).sum(1)


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_dpo_loss_is_the_formula(tmp_path: Path, loss_type: str, beta: float) -> None:
    trainer = build_trainer(tmp_path, [*FLOAT64, "recipe=dpo", f"recipe.beta={beta}", f"recipe.loss_type={loss_type}"])
    batch = wide_batch(trainer)
    ids, mask, scored = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        policy = answer_logps(trainer.model, ids, mask, scored)
        with trainer.model.disable_adapter():
            reference = answer_logps(trainer.model, ids, mask, scored)
    chosen, rejected = (policy - reference).chunk(2)
    difference = chosen - rejected
    if loss_type == "ipo":
        # IPO averages over tokens (arXiv 2310.12036, eq. 17; TRL divides by the answer's length).
        lengths = scored[:, 1:].sum(1).double()
        chosen, rejected = ((policy - reference) / lengths).chunk(2)
        difference = chosen - rejected
    expected = {
        "sigmoid": -F.logsigmoid(beta * difference),  # arXiv 2305.18290, eq. 7
        "hinge": torch.relu(1 - beta * difference),  # arXiv 2309.06657
        "ipo": (difference - 1 / (2 * beta)) ** 2,
    }[loss_type].mean()
    # TRL's head computes in float32.
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)


def test_sft_loss_is_on_the_answer_alone(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, [*FLOAT64, "recipe=sft"])
    batch = wide_batch(trainer)
    ids, labels = batch["input_ids"], batch["labels"]
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model.get_base_model()(input_ids=ids, attention_mask=batch["attention_mask"]).logits.double()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)

    row = trainer.train_dataset[0]
    scored = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    text = trainer.processing_class.decode(scored)
    assert text.endswith("<|im_end|>\n")
    assert "<|im_start|>" not in text
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
