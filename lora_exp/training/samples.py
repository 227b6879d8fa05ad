"""Answers to fixed prompts, so that a person can read what training changed."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_exp.data.tokenize import TokenizedData


@dataclass(frozen=True)
class Prompt:
    """A prompt with the token ids that training sees (cut to its limit) and the answer that its row gives."""

    text: str
    ids: list[int]
    expected: str


def fixed_prompts(data: TokenizedData, answer_column: str, number: int) -> list[Prompt]:
    """Return the first prompts of `val`, or of `train` where there is none."""
    split = "val" if "val" in data.datasets else "train"
    dataset, rows = data.datasets[split], data.splits[split].rows
    first = (dataset[index] for index in range(min(number, len(dataset))))
    return [Prompt(rows[each["row"]]["prompt"], each["prompt_ids"], rows[each["row"]][answer_column]) for each in first]


def answer(model: Any, tokenizer: Any, prompts: list[Prompt], max_new_tokens: int) -> list[str]:
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
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def length_metrics(tokenizer: Any, answers: list[str]) -> dict[str, float]:
    """Return the mean number of tokens of the answers, under the name that TRL's GRPO gives it; nothing of none."""
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers]
    return {"completions/mean_length": fmean(lengths)} if lengths else {}
