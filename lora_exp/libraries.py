"""What every run trains with, imported once a process."""

from __future__ import annotations

import gc
from functools import cache

from lora_exp.quiet import import_quietly

LIBRARIES = (
    "transformers.integrations.integration_utils",  # says so where WANDB_MODE is offline
    "lora_exp.preflight.fit",
    "lora_exp.preflight.place",
    "lora_exp.training.loop",
    "lora_exp.recipes.trl",
    "peft",
    "bitsandbytes",
    "lora_exp.training.callbacks",
)


@cache
def load_libraries() -> None:
    """Import them without looking for garbage meanwhile, and leave what they made out of every later look.

    They make some 900,000 objects that stay until the process ends, and each look for garbage would go through all of
    them: dozens of times as they come, and twice a job after that, a quarter of a second each.

    Called before a model is there: what is alive now is never again looked at for cycles, and one that it is a part of
    would stay.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name in LIBRARIES:
            import_quietly(name)
    finally:
        if collecting:
            gc.enable()
    gc.collect()  # an error that an import has caught holds the frames of its callers, and so of this job
    gc.freeze()
