"""What becomes of a process whose jobs fail: told as it happens, counted in the exit status."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from lora_exp.errors import USER_ERROR_STATUS, UserError, count, print_user_error
from lora_exp.secrets.masking import safe
from lora_exp.sweeps.answer import close, tell
from lora_exp.sweeps.supervisor import lost


class Failures:
    """The trials of this process that failed: told as it happens, counted in the exit status."""

    def __init__(self) -> None:
        self.user_errors = 0
        self.bugs = 0
        self.told = False

    def guard(
        self, job: Callable[[], float | list[float] | None], folder: Path, stop_at_first: bool
    ) -> float | list[float] | None:
        """Run one job and return its objective; a trial that fails spares the others of its multirun.

        Args:
            job: What runs it.
            folder: Its folder.
            stop_at_first: Whether a failure ends the multirun.
        """
        begun = time.time()
        try:
            if folder.resolve() in lost:
                raise UserError(f"{lost[folder.resolve()]}; the same command again goes on with it")
            return job()
        except UserError as error:
            self.user_errors += 1
            print_user_error(UserError(f"{folder.name}: {error.title}", error.problems) if self._multirun() else error)
        except Exception:  # noqa: BLE001 - told with its traceback, and counted in the exit status
            self.bugs += 1
            sys.stdout.flush()
            print(f"error: {folder.name} failed with", file=sys.stderr)  # noqa: T201
            print(safe(traceback.format_exc()), file=sys.stderr, end="")  # noqa: T201
        finally:
            if self._multirun() and _written_since(folder / "run.json", begun):
                tell(folder.parent)
                self.told = True
        if stop_at_first and self._multirun():
            print("error: the sweep stops at its first failed trial: sweep.fail_fast=true", file=sys.stderr)  # noqa: T201
        if stop_at_first or not self._multirun():
            raise SystemExit(self.status)
        return None

    @property
    def status(self) -> int:
        """The exit status of the process: 2 where users can mend all that failed, 1 for a bug."""
        return 1 if self.bugs else USER_ERROR_STATUS if self.user_errors else 0

    def conclude(self, sweep: Path | None) -> None:
        """Tell what a sweep found, and end the process with its status where a trial failed."""
        if sweep is not None:
            if not self.told:  # every trial was there already
                tell(sweep)
            close(sweep, news=self.told)
        failed = self.bugs + self.user_errors
        if failed:
            sys.stdout.flush()
            print(f"error: {count(failed, 'trial')} failed; see above", file=sys.stderr)  # noqa: T201
            raise SystemExit(self.status)

    @staticmethod
    def _multirun() -> bool:
        return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _written_since(file: Path, moment: float) -> bool:
    return file.is_file() and file.stat().st_mtime >= moment


failures = Failures()
