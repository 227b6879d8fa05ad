"""Several processes of one run, as torchrun, accelerate launch or MPI start them: refused, as they would train apart.

The names are those that accelerate reads (1.15, `accelerate/state.py`).
"""

from __future__ import annotations

import os
import sys
import time

from lora_exp.errors import USER_ERROR_STATUS, Problem, UserError

LAUNCHERS = {
    "WORLD_SIZE": "RANK",
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}
"""The number of processes, and which one this is, as each launcher names them."""

WAIT_S = 5.0
"""How long the other ranks leave the first one to speak: torchrun ends all of them once one has ended."""


def require_one_process() -> None:
    """Check that this process is a run by itself.

    Raises:
        UserError: In the first of several processes. The others end without a message.
    """
    name = next((name for name in LAUNCHERS if os.environ.get(name, "") not in ("", "1")), None)
    if name is None:
        return
    if os.environ.get(LAUNCHERS[name], "0") != "0":
        time.sleep(WAIT_S)
        sys.exit(USER_ERROR_STATUS)
    what = f"is {os.environ[name]}: several processes cannot train one run yet: they would exchange no gradients"
    hint = f"start it as one process: python -m lora_exp ..., or unset {name}"
    raise UserError("the run cannot start", [Problem(name, what, hint)])
