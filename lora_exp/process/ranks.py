"""Several processes of one run, as torchrun, accelerate launch or MPI start them: refused, as they would train apart.

The names are those that accelerate reads (1.15, `accelerate/state.py`).
"""

from __future__ import annotations

import os
import sys
import time

from lora_exp.errors import USER_ERROR_STATUS, Problem, UserError

WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")

WAIT_S = 5.0
"""How long the other ranks leave the first one to speak: torchrun ends all of them once one has ended."""


def require_one_process() -> None:
    """Check that this process is a run by itself.

    Raises:
        UserError: In the first of several processes. The others end without a message.
    """
    name, size = next(((name, os.environ[name]) for name in WORLD if os.environ.get(name)), ("", "1"))
    if size == "1":
        return
    if _rank() != "0":
        time.sleep(WAIT_S)
        sys.exit(USER_ERROR_STATUS)
    what = f"is {size}: several processes cannot train one run yet, and would train without exchanging gradients"
    hint = f"start it as one process: python -m lora_exp ..., or unset {name}"
    raise UserError("the run cannot start", [Problem(name, what, hint)])


def _rank() -> str:
    return next((os.environ[name] for name in RANK if os.environ.get(name)), "0")
