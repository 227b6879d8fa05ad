"""A real model: SmolLM2 135M, fetched through pip (`make test-slow`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_exp.data.tokenize import Limits, tokenize_split
from lora_exp.models.source import locate
from lora_exp.recipes.sft import with_labels
from lora_exp.training.samples import Prompt, answer
from tests.runs import composed, run_in

pytestmark = pytest.mark.slow
ROWS = Path(__file__).parents[3] / "shared" / "data" / "splits"
SHORT = ["model=smollm2_135m", "tracker=none", "trainer.per_device_train_batch_size=2", "trainer.logging_steps=1"]


@pytest.fixture(scope="module")
def fetched() -> str:
    from lora_exp.validation import validate

    return locate(validate(composed(["model=smollm2_135m"])).model)


def test_it_knows_the_capital_of_france(fetched: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetched)
    model = AutoModelForCausalLM.from_pretrained(fetched, dtype=torch.float32)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "Paris" in answer(model, tokenizer, [Prompt("", "", ids)], 12)[0].text


@pytest.mark.parametrize("quant", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_every_recipe_trains_on_every_base(fetched: str, tmp_path: Path, recipe: str, quant: str) -> None:
    schedule = ["trainer.max_steps=4", "trainer.eval_strategy=no", "samples.num_prompts=1", "samples.max_new_tokens=8"]
    run = run_in(tmp_path / "run", [f"recipe={recipe}", f"quant={quant}", *SHORT, *schedule])
    losses = [line["loss"] for line in run.results.steps if "loss" in line]
    assert len(losses) == 4
    assert run.results.run["status"] == "finished"
    first = 0.6931 if recipe == "dpo" else losses[0]
    assert losses[0] == pytest.approx(first, abs=1e-3)


def test_sft_lowers_the_loss_on_unseen_rows(fetched: str, tmp_path: Path) -> None:
    schedule = [
        "trainer.max_steps=40",
        "trainer.learning_rate=1e-3",
        "trainer.eval_on_start=true",
        "samples.num_prompts=0",
    ]
    run = run_in(tmp_path / "run", ["recipe=sft", *SHORT, *schedule])
    assert run.results.metrics["eval_loss"] < 0.9 * run.results.first_evaluation["eval_loss"]


@pytest.mark.skipif(not ROWS.is_dir(), reason="needs the folder of real rows beside the clone")
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_real_rows_are_cut_and_counted(fetched: str, tmp_path: Path, recipe: str) -> None:
    schedule = ["trainer.max_steps=1", "trainer.eval_strategy=no", "samples.num_prompts=0", "recipe.max_length=256"]
    source = [
        "data=splits",
        f"data.splits_dir={ROWS}",
        f"data.val_file={ROWS / ('val.dpo.jsonl' if recipe == 'dpo' else 'val.jsonl')}",
    ]
    run = run_in(
        tmp_path / "run", [f"recipe={recipe}", *SHORT, *schedule, *source, "trainer.per_device_eval_batch_size=2"]
    )
    report = json.loads((run.folder / "data_report.json").read_text())
    for split in report.values():
        assert split["rows"] == split["kept"] + sum(split["dropped"].values())
        assert split["prompt_lengths"]["max"] <= 128
        assert split["cut_answers"] > 0


SAID = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{message['content'] + '<|im_end|>' + '\n'}}{% endgeneration %}{% else %}"
    "{{message['content'] + '<|im_end|>' + '\n'}}{% endif %}"
)


@pytest.mark.skipif(not ROWS.is_dir(), reason="needs the folder of real rows beside the clone")
def test_the_loss_of_real_conversations_is_where_trl_has_it(fetched: str) -> None:
    """Side by side with `assistant_only_loss`, which wants the assistant marked in the model's template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetched)
    assert SAID in tokenizer.chat_template
    lines = (ROWS / "conversations.dpo.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    rows = [{"messages": row["prompt"] + row["chosen"]} for row in pairs]
    ours = with_labels(
        tokenize_split(rows, ("completion",), tokenizer, Limits(10**6, None, "left"), True, "the rows")[0]
    )
    marked = tokenizer.chat_template.replace(SAID, MARKED)
    turns = 0
    for row, made in zip(rows, ours, strict=True):
        theirs = tokenizer.apply_chat_template(
            row["messages"], chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        assert made["input_ids"] == theirs["input_ids"]
        assert [label != -100 for label in made["labels"]] == [bool(each) for each in theirs["assistant_masks"]]
        turns += sum(message["role"] == "assistant" for message in row["messages"])
    assert turns > 2 * len(rows)
