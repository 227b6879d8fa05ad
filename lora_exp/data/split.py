"""A split: the checked rows of a file or a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Split:
    """The rows of one split.

    Args:
        rows: They, as `Row.columns` gives them.
        source: What they are called in messages and reports.
        format: The name of their format.
        files: The files of this machine that they were read from.
        revision: What `datasets` calls the state of a data set that comes from elsewhere; None for files.
    """

    rows: list[dict[str, Any]]
    source: str
    format: str = ""
    files: tuple[Path, ...] = ()
    revision: str | None = None
