"""Nobody watches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_exp.tracking.base import ActiveRun, Ending, RunInfo, Tracker


class Unwatched(ActiveRun):
    """A run that no tracker hears of."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep quiet."""

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Keep quiet."""

    def finish(self, status: Ending) -> None:
        """Keep quiet."""


class NoTracker(Tracker):
    """conf/tracker/none.yaml."""

    label = "none"

    def start(self, info: RunInfo) -> ActiveRun:  # noqa: ARG002
        """Open nothing."""
        return Unwatched()
