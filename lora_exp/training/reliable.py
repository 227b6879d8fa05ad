"""What a trainer of TRL lacks for a long run: checkpoints that are whole, and steps that are looked at."""

from __future__ import annotations

from typing import Any

from lora_exp.training.saving import WholeCheckpoints
from lora_exp.training.watch import WatchedSteps


def reliable(trainer: type[Any]) -> type[Any]:
    """Return a trainer class that loses nothing and learns nothing silly.

    Args:
        trainer: A TRL trainer with `CarriedTotals` mixed in, as an engine has made it.
    """
    return type(f"Reliable{trainer.__name__}", (WatchedSteps, WholeCheckpoints, trainer), {})
