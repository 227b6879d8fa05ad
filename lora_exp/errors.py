"""What a user did wrong: where, what, and the mend. Everything else that is raised is a bug and keeps its traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from traceback import walk_tb

from lora_exp.secrets.masking import safe

USER_ERROR_STATUS = 2
"""Exit status of a run that the user can mend; a bug exits with 1."""


@dataclass(frozen=True)
class Problem:
    """One thing to mend.

    Args:
        where: The key (`recipe.beta`) or the place in a file (`train.jsonl:12`).
        what: What is wrong there, as a sentence without a full stop.
        mend: What to do about it; empty where `what` says it already.
    """

    where: str
    what: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}"
        return f"{line}\n    {self.mend}" if self.mend else line


class UserError(Exception):
    """Problems that the user can mend, all that were found and not only the first.

    Args:
        title: What was being done, e.g. `the config has 2 problems`.
        problems: Each place with its mend; may be empty where the title says it all.
    """

    def __init__(self, title: str, problems: Iterable[Problem] = ()) -> None:
        self.title = title
        self.problems = list(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"  {problem}".replace("\n", "\n  ") for problem in self.problems)])


class Pruned(Exception):  # noqa: N818 - no error: a trial of a search ends early because it falls behind
    """Raised in a run to end it.

    Args:
        reason: Where it was and what it had found.
    """


class Interrupted(BaseException):  # no Exception: whoever spares the run from errors must let it leave
    """Raised in a run that was asked to leave by a signal.

    Args:
        what: By which one, and where the run was.
        mend: The command that goes on.
        status: The exit status.
    """

    def __init__(self, what: str, mend: str, status: int) -> None:
        self.what = what
        self.mend = mend
        self.status = status
        super().__init__(what)

    def __str__(self) -> str:
        return f"{self.what}\n    {self.mend}"


def print_user_error(error: UserError | Interrupted) -> None:
    """Write the error to stderr, plain and safe, so that `file:line: reason` stays whole at any terminal width."""
    sys.stdout.flush()
    print(safe(f"error: {error}"), file=sys.stderr)  # noqa: T201


def raised_here(error: Exception) -> bool:
    """Whether an error was raised in this project's own code, by a wrong call say: a bug, which keeps its traceback."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("lora_exp.")


def count(number: int, noun: str, plural: str = "") -> str:
    """Return `1 row`, `2 rows`, with thousands marked: `1,200 rows`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
