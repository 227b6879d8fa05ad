"""A split: the checked rows of a file or a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Split:
    """The rows of one split, as `Row.columns` gives them; where they come from, and the name of their format."""

    rows: list[dict[str, Any]]
    source: str
    format: str = ""
