"""TRL's own forward, untouched."""

from __future__ import annotations

from typing import Any, ClassVar

from lora_exp.engine.base import Engine


class Padded(Engine):
    """Batches padded to their longest row; a reference is computed anew in each step."""

    name: ClassVar[str] = "padded"

    def trainer_class(self, trainer: type[Any]) -> type[Any]:
        """Return the class as it is."""
        return trainer
