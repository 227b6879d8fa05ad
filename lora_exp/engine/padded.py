"""TRL's own forward, untouched."""

from __future__ import annotations

from typing import Any, ClassVar

from lora_exp.engine.base import Engine, Work


class Padded(Engine):
    """Batches padded to their longest row; a reference is computed anew in each step."""

    name: ClassVar[str] = "padded"

    def tokens_at_once(self, work: Work) -> int:
        """Return a whole batch, padded to the longest row."""
        rows: int = work.arguments["per_device_train_batch_size"] * len(work.recipe.row_kind.answers)
        return rows * work.longest

    def trainer_class(self, trainer: type[Any]) -> type[Any]:
        """Return the class as it is."""
        return trainer
