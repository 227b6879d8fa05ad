"""Both recipes on every base really train, and leave behind what the contract says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.few import ROWS
from tests.runs import Finished, load_policy, run_in

SHORT = ("trainer.max_steps=4", "trainer.logging_steps=1", "samples.num_prompts=1", "samples.max_new_tokens=4", *ROWS)
RECIPES = ("sft", "dpo")
QUANTS = ("none", "8bit", "4bit")
CONTRACT = (
    ".hydra/../config.yaml",
    "run.json",
    "metrics.jsonl",
    "metrics.json",
    "data_report.json",
    "adapter/adapter_model.safetensors",
    "adapter/tokenizer.json",
    "checkpoints",
    "samples.jsonl",
    "report.html",
)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("recipe", RECIPES)
class TestEveryRecipeOnEveryBase:
    def test_the_loss_moves_and_is_finite(self, finished: Finished, recipe: str, quant: str) -> None:
        steps = finished(f"recipe={recipe}", f"quant={quant}", *SHORT).results.steps
        losses = [line["loss"] for line in steps if "loss" in line]
        assert len(losses) == 4
        assert all(loss is not None and loss > 0 for loss in losses)
        assert all(line["grad_norm"] > 0 for line in steps if "grad_norm" in line)

    def test_the_adapter_moved_and_nothing_but_lora_is_in_it(self, finished: Finished, recipe: str, quant: str) -> None:
        from safetensors.torch import load_file

        run = finished(f"recipe={recipe}", f"quant={quant}", *SHORT)
        tensors = load_file(run.folder / "adapter" / "adapter_model.safetensors")
        assert {name.rsplit(".", 2)[1] for name in tensors} == {"lora_A", "lora_B"}
        assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)

    def test_the_folder_is_whole(self, finished: Finished, recipe: str, quant: str) -> None:
        run = finished(f"recipe={recipe}", f"quant={quant}", *SHORT)
        assert [name for name in CONTRACT if not (run.folder / name.removeprefix(".hydra/../")).exists()] == []
        facts = run.results.run
        assert facts["status"] == "finished"
        assert facts["objective"] == run.objective == run.results.metrics[facts["objective_name"]]
        assert {"data", "model", "train", "evaluate", "save"} <= facts["wall_times"].keys()
        assert 0 <= run.results.metrics["completions/mean_length"] <= 4
        assert facts["peak_memory_bytes"] > 0
        assert facts["trainable_parameters"] > 0
        report = json.loads((run.folder / "data_report.json").read_text())
        assert report["train"]["rows"] == report["train"]["kept"] + sum(report["train"]["dropped"].values())

    def test_only_lora_parameters_train(self, finished: Finished, recipe: str, quant: str) -> None:
        run = finished(f"recipe={recipe}", f"quant={quant}", *SHORT)
        policy, _ = load_policy(run.folder, str(run.folder))
        trainable = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
        lora = {name for name, _ in policy.model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
        assert trainable == lora
        assert sum(policy.model.get_parameter(name).numel() for name in lora) == policy.trainable_parameters


@pytest.mark.parametrize(
    "overrides",
    [
        ("recipe=sft",),
        ("recipe=dpo", "quant=8bit"),
        ("recipe=dpo", "quant=4bit"),
        ("recipe=sft", "lora=dora"),
        ("recipe=dpo", "lora=rslora"),
        ("recipe=sft", "lora=pissa"),
        ("recipe=dpo", "lora=pissa"),
    ],
    ids=" ".join,
)
def test_the_adapter_on_disk_gives_the_logits_of_the_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    import torch

    import lora_exp.models.policy as policy_room

    ids = torch.randint(0, 255, (2, 24), generator=torch.Generator().manual_seed(0))
    trained: dict[str, Any] = {}
    save = policy_room.save_adapter

    def save_and_look(policy: Any, tokenizer: Any, folder: Path) -> None:
        policy.model.eval()
        with torch.no_grad():
            trained["logits"] = policy.model(input_ids=ids).logits.float()
        save(policy, tokenizer, folder)

    monkeypatch.setattr(policy_room, "save_adapter", save_and_look)
    folder = tmp_path / "run"
    run_in(folder, ["tracker=none", "trainer.bf16=false", "trainer.learning_rate=1e-2", *SHORT, *overrides])

    reloaded, _ = load_policy(folder, str(folder))
    reloaded.model.eval()
    with torch.no_grad():
        logits = reloaded.model(input_ids=ids).logits.float()
        with reloaded.model.disable_adapter():
            base = reloaded.model(input_ids=ids).logits.float()
    moved = (trained["logits"] - base).abs().max()
    assert moved > 0.05
    assert (trained["logits"] - logits).abs().max() < 1e-3 * moved


def test_gradients_after_an_evaluation_are_those_before_it(finished: Finished) -> None:
    """bitsandbytes repacks 4-bit weights in eval mode on some processors, into a layout without a backward."""
    import torch

    policy, _ = load_policy(finished("recipe=sft", "quant=4bit", *SHORT).folder)
    ids = torch.randint(0, 255, (2, 24), generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, torch.Tensor]:
        policy.model.train()
        policy.model.zero_grad()
        torch.manual_seed(0)
        policy.model(input_ids=ids, labels=ids).loss.backward()
        named = policy.model.named_parameters()
        return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}

    before = gradients()
    policy.model.eval()
    with torch.no_grad():
        policy.model(input_ids=ids)
    after = gradients()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("trainer", ["cpu", "low_memory"])
@pytest.mark.parametrize("quant", ["none", "4bit"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_trainer_for_a_processor_trains(finished: Finished, recipe: str, quant: str, trainer: str) -> None:
    run = finished(f"recipe={recipe}", f"quant={quant}", f"trainer={trainer}", *SHORT)
    gradients = [line["grad_norm"] for line in run.results.steps if "grad_norm" in line]
    assert len(gradients) == 4
    assert all(gradient > 0 for gradient in gradients)


DEMO_SFT = ("recipe=sft", "experiment=demo_sft", "trainer.num_train_epochs=2", "samples.num_prompts=0")
DEMO_DPO = ("recipe=dpo", "experiment=demo_dpo", "trainer.num_train_epochs=2", "samples.num_prompts=0")


def test_sft_learns(finished: Finished) -> None:
    run = finished(*DEMO_SFT)
    before, after = run.results.first_evaluation["eval_loss"], run.results.metrics["eval_loss"]
    assert after < 0.75 * before, f"the loss on unseen rows fell from {before:.2f} to {after:.2f} only"


def test_dpo_on_top_of_sft_learns_to_prefer(finished: Finished) -> None:
    start = finished(*DEMO_SFT)
    run = finished(*DEMO_DPO, f"model.adapter={start.folder}", "trainer.logging_steps=5")
    last = [line["rewards/accuracies"] for line in run.results.steps if "rewards/accuracies" in line][-6:]
    assert sum(last) / len(last) > 0.9, "training pairs"
    assert run.results.metrics["eval_rewards/accuracies"] > 0.5 + 0.2, "pairs it has not seen"
