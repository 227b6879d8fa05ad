"""Supervised fine-tuning: learn the answer to each prompt, with the loss on the answer alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lora_exp.data.kinds import COMPLETION, IGNORED
from lora_exp.recipes.base import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_exp.engine.base import Engine
    from lora_exp.models.policy import Policy


class SFT(Recipe):
    """TRL's SFTTrainer on prompt and completion."""

    name = "sft"
    row_kind = COMPLETION
    needs_reference = False
    headline = {"loss": "loss", "mean_token_accuracy": "token accuracy"}
    library_class = "trl.SFTConfig"

    set_elsewhere = {
        **Recipe.set_elsewhere,
        "assistant_only_loss": "nothing: the loss is on the assistant's messages",
        "completion_only_loss": "nothing: the loss is on the answers alone",
        "chat_template_path": "data.chat_template_path=...",
    }

    loss_type: Literal["nll", "dft"]

    def trainer(
        self,
        engine: Engine,
        policy: Policy,
        tokenizer: Any,
        datasets: dict[str, Dataset],
        arguments: dict[str, Any],
        callbacks: list[Any],
    ) -> Any:
        """Return an SFTTrainer over rows that are tokenised already."""
        from trl import SFTConfig

        from lora_exp.recipes.trl import TokenizedSFTTrainer
        from lora_exp.training.arguments import on_one_device
        from lora_exp.training.reliable import reliable

        args = SFTConfig(**arguments, **self.trl_fields, dataset_kwargs={"skip_prepare_dataset": True})
        labelled = {split: with_labels(dataset) for split, dataset in datasets.items()}
        return reliable(engine.trainer_class(TokenizedSFTTrainer))(
            model=policy.model,
            args=on_one_device(args, policy.device),
            train_dataset=labelled["train"],
            eval_dataset=labelled.get("val"),
            processing_class=tokenizer,
            callbacks=callbacks,
        )


def with_labels(dataset: Dataset) -> Dataset:
    """Join prompt and completion to `input_ids`, with `labels` that ignore what carries no loss.

    Args:
        dataset: `prompt_ids`, `completion_ids` and, of conversations, `completion_mask`; without it the whole
            completion is learned.
    """
    from datasets import Dataset as Rows

    prompts, completions = dataset["prompt_ids"], dataset["completion_ids"]
    masks = dataset["completion_mask"] if "completion_mask" in dataset.column_names else map(_ones, completions)
    inputs, labels = [], []
    for prompt, completion, mask in zip(prompts, completions, masks, strict=True):
        inputs.append(prompt + completion)
        scored = (token if score else IGNORED for token, score in zip(completion, mask, strict=True))
        labels.append([IGNORED] * len(prompt) + list(scored))
    return Rows.from_dict({"input_ids": inputs, "labels": labels})


def _ones(ids: list[int]) -> list[int]:
    return [1] * len(ids)
