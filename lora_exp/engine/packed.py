"""Flat rows without padding, prompts computed once, only scored positions through the output layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_exp.engine.base import Engine, Work
from lora_exp.engine.padded import Padded

if TYPE_CHECKING:
    from lora_exp.engine.identity import Identity
    from lora_exp.engine.settings import Choice, Forecast
    from lora_exp.engine.store import ReferenceStore
    from lora_exp.recipes.base import Recipe


class Packed(Engine):
    """The same losses from packed rows; falls back to `Padded` where that would not be exact."""

    name: ClassVar[str] = "packed"
    keeps_reference: ClassVar[bool] = True
    tokens_per_microbatch: Annotated[int, Field(gt=0)] | Literal["auto"]
    share_under_dropout: bool

    def suited_to(self, work: Work) -> tuple[Engine, str]:
        """Return itself with its micro-batch settled, or `Padded` and the reason."""
        from lora_exp.engine.support import reason_against

        reason = reason_against(work)
        if reason is not None:
            return Padded(target="", num_threads=self.num_threads), f"padded (TRL's own forward): {reason}"
        tokens = self.choose_tokens(work.arguments["gradient_checkpointing"], work.forecast)
        line = f"packed, up to {tokens.value:,} tokens at a time: {tokens.reason}"
        return self.model_copy(update={"tokens_per_microbatch": tokens.value}), line

    def expected_for(self, base: Any, recipe: Recipe) -> tuple[Engine, str]:
        """Return itself, or `Padded` and the reason."""
        from lora_exp.engine.support import reason_of_structure

        reason = reason_of_structure(base, recipe)
        return (self, "") if reason is None else (Padded(target="", num_threads=self.num_threads), reason)

    def choose_tokens(self, checkpointing: bool | Literal["auto"], forecast: Forecast) -> Choice:
        """Return the micro-batch that suits the machine."""
        from lora_exp.engine.settings import choose_tokens

        return choose_tokens(self.tokens_per_microbatch, self.name, checkpointing, forecast)

    def shares(self, drops: bool) -> bool:
        """Return whether examples of a flat row share their common start."""
        return self.share_under_dropout or not drops

    def trainer_class(self, trainer: type[Any]) -> type[Any]:
        """Return the class with its forward and backward pass packed."""
        from lora_exp.engine.training import packed_trainer

        return packed_trainer(trainer)

    def equip(self, trainer: Any, work: Work) -> None:
        """Hand over the forward pass and the micro-batch."""
        from lora_exp.engine.forward import PackedForward

        weighted = getattr(trainer, "use_weighting", False)
        trainer.packed_forward = PackedForward(work.policy.model.get_base_model(), weighted)
        trainer.tokens_per_microbatch = self.tokens_per_microbatch
        trainer.shares = self.shares
        trainer.rows_per_example = len(work.recipe.row_kind.answers)
        trainer.whole_batches = work.recipe.compares_examples

    def reference(self, trainer: Any, store: ReferenceStore, identity: Identity) -> dict[str, int]:
        """Read the rows' reference log-probabilities from the store, and compute what it lacks."""
        from lora_exp.engine.reference import add_reference

        return add_reference(trainer, store, identity)
