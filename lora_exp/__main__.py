"""The door: `python -m lora_exp key=value ...`."""

from __future__ import annotations

import sys

from lora_exp.process.start import start_process

if __name__ == "__main__":
    start_process()  # before anything is imported that would have to be imported again

import hydra
from omegaconf import DictConfig

from lora_exp.cli import launch_from_hydra, prepare
from lora_exp.config import CONF_DIR
from lora_exp.errors import USER_ERROR_STATUS, Interrupted, UserError, print_user_error
from lora_exp.resolvers import register_resolvers
from lora_exp.sweeps.failures import failures

register_resolvers()


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def launch(composed: DictConfig) -> float | list[float] | None:
    """Run one job, alone or of a multirun."""
    from lora_exp.run import run

    job = launch_from_hydra()
    return failures.guard(lambda: run(composed, job), job.folder, composed.sweep.fail_fast)


def main() -> None:
    """Check the command line, then let Hydra run it."""
    try:
        sys.argv[1:], sweep = prepare(sys.argv[1:])
        launch()
        failures.conclude(sweep)
    except UserError as error:
        print_user_error(error)
        sys.exit(USER_ERROR_STATUS)
    except Interrupted as asked:
        print_user_error(asked)
        sys.exit(asked.status)
    except KeyboardInterrupt:  # before there is a run
        sys.exit(130)


def script() -> None:
    """Do the same as the command `lora-exp`."""
    start_process()
    main()


if __name__ == "__main__":
    main()
