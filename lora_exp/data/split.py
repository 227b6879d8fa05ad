"""A split: the checked rows of a file or a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.data.duplicates import Finding


@dataclass(frozen=True)
class Split:
    """The rows of one split, as `Row.columns` gives them.

    Args:
        rows: The rows; more may be there than fit in memory.
        source: What they are called in messages and reports.
        format: The name of their format.
        findings: What is no mistake in them and that the user should know.
        files: The files of this machine that they were read from.
        revision: What `datasets` calls the state of a data set that comes from elsewhere; None for files.
    """

    rows: Sequence[dict[str, Any]]
    source: str
    format: str = ""
    findings: tuple[Finding, ...] = ()
    files: tuple[Path, ...] = ()
    revision: str | None = None

    def found(self) -> dict[str, Any]:
        """Return the findings for `data_report.json`."""
        return {"findings": {each.name: {"rows": each.number, "first": each.first} for each in self.findings}}
