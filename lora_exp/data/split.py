"""A split: the checked rows of a file or a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_exp.data.duplicates import Finding


@dataclass(frozen=True)
class Split:
    """The rows of one split, as `Row.columns` gives them.

    Args:
        rows: The rows; more may be there than fit in memory.
        source: Where they come from.
        format: The name of their format.
        findings: What is no mistake in them and that the user should know.
    """

    rows: Sequence[dict[str, Any]]
    source: str
    format: str = ""
    findings: tuple[Finding, ...] = ()

    def found(self) -> dict[str, Any]:
        """Return the findings for `data_report.json`."""
        return {"findings": {each.name: {"rows": each.number, "first": each.first} for each in self.findings}}
