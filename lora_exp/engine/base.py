"""What every engine has in common: how the numbers under TRL's losses are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_exp.config import Section

if TYPE_CHECKING:
    from lora_exp.engine.identity import Identity
    from lora_exp.engine.settings import Choice, Forecast
    from lora_exp.engine.store import ReferenceStore
    from lora_exp.models.policy import Policy
    from lora_exp.recipes.base import Recipe


@dataclass(frozen=True)
class Work:
    """What an engine has to compute.

    Args:
        policy: What is trained.
        recipe: What is learned.
        arguments: Fields of `transformers.TrainingArguments`.
        longest: Tokens of the longest row.
        forecast: Of its memory.
    """

    policy: Policy
    recipe: Recipe
    arguments: dict[str, Any]
    longest: int
    forecast: Forecast


class Engine(Section, ABC):
    """The keys of an engine, and how it computes."""

    name: ClassVar[str]
    keeps_reference: ClassVar[bool] = False
    """Whether `reference` reads and writes the store; otherwise TRL computes it in each step."""
    target: str = Field(alias="_target_")
    num_threads: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"

    def suited_to(self, work: Work) -> tuple[Engine, str]:  # noqa: ARG002
        """Return the engine that computes this exactly, itself wherever it can, and the line that says why."""
        return self, self.name

    def expected_for(self, base: Any, recipe: Recipe) -> tuple[Engine, str]:  # noqa: ARG002
        """Return the engine that will compute this, as far as a model without weights tells, and a reason if another.

        Args:
            base: The `PreTrainedModel`, its adapter layers inside.
            recipe: What is learned.
        """
        return self, ""

    def choose_tokens(self, checkpointing: bool | Literal["auto"], forecast: Forecast) -> Choice | None:  # noqa: ARG002
        """Return how many tokens a micro-batch has, and why; None where whole batches are computed.

        Args:
            checkpointing: The config's `trainer.gradient_checkpointing`.
            forecast: Of the run's memory.
        """
        return None

    def shares(self, drops: bool) -> bool:  # noqa: ARG002
        """Return whether examples of a flat row, in this engine or one put in its place, share their common start.

        Args:
            drops: Whether some of it is dropped at random.
        """
        return True

    @abstractmethod
    def trainer_class(self, trainer: type[Any]) -> type[Any]:
        """Return a TRL trainer class that computes as this engine does."""

    def equip(self, trainer: Any, work: Work) -> None:
        """Give a trainer of `trainer_class` what it needs before its first step."""

    def reference(self, trainer: Any, store: ReferenceStore, identity: Identity) -> dict[str, int]:  # noqa: ARG002
        """Give the trainer the reference log-probabilities of its rows.

        Returns:
            How many rows were `computed` and how many `reused`.
        """
        return {"computed": len(trainer.train_dataset) + len(trainer.eval_dataset or ()), "reused": 0}
