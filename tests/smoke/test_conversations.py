"""Conversations train as TRL trains them: the same rows, the same loss, by either engine."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_exp.config import CONF_DIR
from lora_exp.data.tokenize import Limits, tokenize_split
from lora_exp.models.embedded import build
from lora_exp.recipes.sft import with_labels
from tests.engines import (
    ALL_AT_ONCE,
    PAIR_AT_A_TIME,
    SOME_AT_A_TIME,
    Engines,
    batches,
    build_engines,
)
from tests.few import SMALL
from tests.rows import assistant, says, system, user
from tests.runs import composed, run_in

Json = dict[str, Any]
ENOUGH = Limits(1_000_000, None, "left")
TURNS = "data.chat_template=auto"


def conversations(number: int = 13) -> list[Json]:
    """Return conversations of one to four turns, some with a system message, some that begin alike."""
    draw = random.Random(1)

    def text(longest: int = 30) -> str:
        return "".join(draw.choices(string.ascii_lowercase + " ", k=draw.randint(1, longest))).strip() or "x"

    rows = []
    for index in range(number):
        said = [system(text())] if index % 3 == 0 else []
        for _ in range(1 + index % 4):
            said += [user("Hello." if index % 2 else text()), assistant(text())]
        rows.append({"messages": said})
    return rows


def pairs(number: int = 7) -> list[Json]:
    """Return the same as prompts with two answers, one of them of several messages."""
    return [
        {
            "prompt": row["messages"][:-1],
            "chosen": row["messages"][-1:],
            "rejected": [assistant("Let me see."), says("tool", "nothing"), assistant(f"No {index}.")],
        }
        for index, row in enumerate(conversations(number))
    ]


def write(path: Path, rows: list[Json]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    folder = tmp_path_factory.mktemp("conversations")
    rows = conversations()
    files = [
        f"data.train_file={write(folder / 'chat.jsonl', rows[:-3])}",
        f"data.val_file={write(folder / 'val.jsonl', rows[-3:])}",
    ]
    overrides = ["recipe=sft", TURNS, "recipe.max_length=400", *SMALL, *files]
    made = build_engines(folder, overrides).to(torch.float64)
    gaps = [_gaps(labels) for labels in made.packed.train_dataset["labels"]]
    assert max(gaps) >= 3, "some rows have several turns"
    return made


def _gaps(labels: list[int]) -> int:
    scored = [label != -100 for label in labels]
    return sum(one and not other for one, other in pairwise(scored))


@pytest.mark.parametrize("budget", [PAIR_AT_A_TIME, SOME_AT_A_TIME, ALL_AT_ONCE])
def test_a_step_over_several_turns_is_the_same_packed_and_padded(engines: Engines, budget: int) -> None:
    padded, packed = engines.padded_step(), engines.packed_step(budget)
    assert padded.gradient.norm() > 0
    assert packed.loss == pytest.approx(padded.loss, rel=1e-7)
    assert packed.metrics == pytest.approx(padded.metrics, rel=1e-7)
    assert (packed.gradient - padded.gradient).norm() <= 1e-6 * padded.gradient.norm()


def test_an_evaluation_over_several_turns_is_the_same_packed_and_padded(engines: Engines) -> None:
    engines.packed.tokens_per_microbatch = SOME_AT_A_TIME
    found = [each.evaluate()["eval_loss"] for each in (engines.padded, engines.packed)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_loss_is_the_mean_over_the_assistants_tokens(engines: Engines) -> None:
    """Worked out from the plain logits of each row, alone and without padding."""
    trainer = engines.padded
    (batch,) = batches(trainer, number=1, size=5)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        total, tokens = 0.0, 0
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            logits = trainer.model.get_base_model()(input_ids=ids[None, :length]).logits[0].double()
            scored = [place for place in range(1, length) if labels[place] != -100]
            logps = logits.log_softmax(-1)
            total -= float(sum(logps[place - 1, ids[place]] for place in scored))
            tokens += len(scored)
    assert float(loss) == pytest.approx(total / tokens, rel=2e-5)


# Side by side with TRL's own preparation.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the embedded model, whose tokenizer has ChatML without marks."""
    folder = tmp_path_factory.mktemp("base")
    spec = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / "tiny.yaml"))["embedded"]  # type: ignore[index,call-overload]
    build(spec, folder)  # type: ignore[arg-type]
    return folder


MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The embedded tokenizer's template with the assistant's words marked, as TRL wants it."""


def prepared(trainer: str, base: Path, folder: Path, rows: list[Json], template: str | None, **arguments: Any) -> Any:
    """Return the rows as TRL's own trainer prepares them."""
    import trl

    class Quiet(getattr(trl, f"{trainer}Trainer")):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            """Ask the hub nothing."""

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template or tokenizer.chat_template
    config = getattr(trl, f"{trainer}Config")(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, max_length=None,
        gradient_checkpointing=False, **arguments,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base)
    made = Quiet(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return made.train_dataset


def test_rows_are_those_of_trls_assistant_only_loss(base: Path, tmp_path: Path) -> None:
    rows = conversations()
    theirs = prepared("SFT", base, tmp_path, rows, MARKED, assistant_only_loss=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ours = with_labels(tokenize_split(rows, ("completion",), tokenizer, ENOUGH, True, "")[0])
    for column in ("input_ids", "labels"):
        assert ours[column][:] == theirs[column][:]


def test_pairs_of_messages_are_those_of_trls_dpo_trainer(base: Path, tmp_path: Path) -> None:
    rows = pairs()
    theirs = prepared("DPO", base, tmp_path, rows, None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ours, _ = tokenize_split(rows, ("chosen", "rejected"), tokenizer, ENOUGH, True, "")
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[column][:] == theirs[column][:]


# Whole runs.

FEW = ["tracker=none", "trainer.max_steps=2", "samples.num_prompts=2", "samples.max_new_tokens=4"]


@pytest.mark.parametrize(("recipe", "make"), [("sft", conversations), ("dpo", pairs)], ids=["sft", "dpo"])
def test_a_run_on_conversations_ends_well(recipe: str, make: Callable[[], list[Json]], tmp_path: Path) -> None:
    rows = make()
    files = [f"data.train_file={write(tmp_path / 'rows.jsonl', rows)}", f"data.val_file={tmp_path / 'rows.jsonl'}"]
    run = run_in(tmp_path / "run", [f"recipe={recipe}", "data=splits", *files, *FEW]).results
    assert run.run["status"] == "finished"
    report = json.loads((tmp_path / "run" / "data_report.json").read_text(encoding="utf-8"))
    assert report["train"]["format"] == ("messages" if recipe == "sft" else "preference messages")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    first = rows[0].get("prompt") or rows[0]["messages"][:2]
    assert samples[0]["prompt"] == "\n\n".join(f"{each['role']}: {each['content']}" for each in first)


def test_another_template_is_saved_with_the_adapter(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(MARKED, encoding="utf-8")
    files = [f"data.train_file={write(tmp_path / 'rows.jsonl', conversations())}", "trainer.eval_strategy=no"]
    overrides = ["recipe=sft", "data=splits", *files, *FEW, f"data.chat_template_path={template}"]
    assert composed(overrides).data.chat_template_path == str(template)
    run_in(tmp_path / "run", overrides)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template == MARKED
