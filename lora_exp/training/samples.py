"""Answers to fixed prompts, so that a person can read what training changed."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_exp.data.chat import texts

if TYPE_CHECKING:
    from lora_exp.data.tokenize import TokenizedData


@dataclass(frozen=True)
class Prompt:
    """A prompt, the answer that its row gives, and the prompt's token ids as training sees them (cut to the limit)."""

    text: str
    expected: str
    ids: list[int]


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and in how many tokens, the one that ends it not counted."""

    text: str
    length: int


def fixed_prompts(data: TokenizedData, answer_column: str, number: int) -> list[Prompt]:
    """Return the first prompts of `val`, or of `train` where there is none."""
    split = "val" if "val" in data.datasets else "train"
    dataset, rows = data.datasets[split], data.splits[split].rows
    return [
        Prompt(*texts(rows[each["row"]], answer_column), each["prompt_ids"])
        for each in (dataset[index] for index in range(min(number, len(dataset))))
    ]


def answer(model: Any, tokenizer: Any, prompts: list[Prompt], max_new_tokens: int) -> list[Answer]:
    """Return the model's most likely answer to each prompt, at most `max_new_tokens` tokens long.

    The model is left in the mode (train or eval) that it was in.
    """
    if not prompts:
        return []
    import torch

    batch = tokenizer.pad(
        {"input_ids": [prompt.ids for prompt in prompts]},
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_attention_mask=True,
    ).to(model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
    finally:
        model.train(was_training)
    answers = output[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    special = [token for token in (tokenizer.eos_token_id, tokenizer.pad_token_id) if token is not None]
    ends = torch.tensor(special, device=answers.device)
    lengths = torch.isin(answers, ends).logical_not().cumprod(1).sum(1).tolist()
    return [Answer(text.strip(), length) for text, length in zip(texts, lengths, strict=True)]


def length_metrics(answers: list[Answer]) -> dict[str, float]:
    """Return the mean length of the answers, under the name that TRL's GRPO gives it; nothing of none."""
    return {"completions/mean_length": fmean(each.length for each in answers)} if answers else {}
