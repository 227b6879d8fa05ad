"""What every recipe has in common. A new recipe is a subclass and a YAML file under conf/recipe that names it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from lora_exp.config import Section
from lora_exp.data.kinds import RowKind
from lora_exp.data.tokenize import Limits
from lora_exp.rules import Rule

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_exp.engine.base import Engine
    from lora_exp.models.policy import Policy


class Recipe(Section, ABC):
    """The keys of a recipe, and how it trains.

    Class attributes say what a recipe needs, so that nothing asks for its name.
    """

    model_config = ConfigDict(extra="allow")
    name: ClassVar[str]
    row_kind: ClassVar[RowKind]
    """The rows that it learns from."""
    needs_reference: ClassVar[bool]
    """Whether the loss compares with a reference model."""
    logged: ClassVar[frozenset[str]] = frozenset({"loss", "entropy", "mean_token_accuracy", "num_tokens"})
    """What TRL logs in training, and under `eval_` in evaluation."""
    headline: ClassVar[dict[str, str]]
    """The metrics that matter, by the name they are logged under, with a short name for the terminal."""
    target: str = Field(alias="_target_")
    max_length: int = Field(gt=1)
    max_prompt_length: int | None = Field(gt=0)
    eval_max_length: int = Field(gt=1)
    eval_max_prompt_length: int | None = Field(gt=0)
    truncation_side: Literal["left", "right"]
    learning_rate: float = Field(ge=0)
    objective: str

    set_elsewhere = {
        "output_dir": "output_dir=...",
        "gradient_checkpointing": "trainer.gradient_checkpointing=...",
        "logging_steps": "trainer.logging_steps=...",
        "bf16": "trainer.bf16=...",
        "model_init_kwargs": "model.*",
        "trust_remote_code": "model.trust_remote_code=true",
        "truncation_mode": "recipe.truncation_side=left",
        "packing": "nothing: rows are not packed by TRL here",
        "padding_free": "nothing: it does not work in TRL 1.16 with padded attention",
        "dataset_kwargs": "data.*",
    }

    own_keys: ClassVar[frozenset[str]] = frozenset(
        {
            "target",
            "max_length",
            "max_prompt_length",
            "eval_max_length",
            "eval_max_prompt_length",
            "truncation_side",
            "learning_rate",
            "objective",
        }
    )
    """Keys that are ours and no field of the TRL config; `max_length` would have TRL cut evaluation rows to it too."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            ("recipe.max_prompt_length", "recipe.max_length"),
            lambda prompt, total: prompt is not None and prompt >= total,
            "{0} leaves no room for an answer within recipe.max_length={1}",
            "leave it at half of max_length, or make it smaller than max_length",
        ),
        Rule(
            (
                "recipe.eval_max_prompt_length",
                "recipe.eval_max_length",
                "recipe.max_prompt_length",
                "recipe.max_length",
            ),
            lambda prompt, total, *training: prompt is not None and prompt >= total and training != (prompt, total),
            "{0} leaves no room for an answer within recipe.eval_max_length={1}",
            "make it smaller than eval_max_length, or raise that",
        ),
    )

    @classmethod
    def final_metrics(cls) -> frozenset[str]:
        """Return the names that a finished run's metrics may have, beside Trainer's times."""
        return cls.logged | {f"eval_{name}" for name in cls.logged} | {"train_loss", "train_runtime", "eval_runtime"}

    @property
    def limits(self) -> dict[str, Limits]:
        """How rows are cut, by split."""
        return {
            "train": Limits(self.max_length, self.max_prompt_length, self.truncation_side),
            "val": Limits(self.eval_max_length, self.eval_max_prompt_length, self.truncation_side),
        }

    @property
    def trl_fields(self) -> dict[str, Any]:
        """The recipe's part of the TRL config, fields added with `+recipe.name=value` included."""
        return {**self.model_dump(exclude=set(self.own_keys)), "max_length": None}

    @property
    def compares_examples(self) -> bool:
        """Whether the loss of an example depends on the others of its batch."""
        return False

    @property
    def zero_loss(self) -> bool:
        """Whether a loss of exactly 0 can be right. Of a likelihood it says that nothing was learned from."""
        return False

    @abstractmethod
    def trainer(
        self,
        engine: Engine,
        policy: Policy,
        tokenizer: Any,
        datasets: dict[str, Dataset],
        arguments: dict[str, Any],
        callbacks: list[Any],
    ) -> Any:
        """Return the TRL trainer.

        Args:
            engine: How it computes.
            policy: What is trained.
            tokenizer: Pads batches, and is saved with each checkpoint.
            datasets: `train` and perhaps `val`, as `tokenize_split` makes them.
            arguments: Fields of `transformers.TrainingArguments`.
            callbacks: Trainer callbacks.
        """
