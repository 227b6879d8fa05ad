"""What every tracker has in common, and the promise that none of them ends a run."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from lora_exp.config import Section
from lora_exp.secrets.masking import masked

log = logging.getLogger(__name__)


Ending = Literal["finished", "failed", "pruned"]

SHOWN = ("project", "name", "group", "tags", "notes", "entity")
"""Keys that a tracker shows to whoever looks; the others, an address say, may need the secret that they hold."""


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of a run.

    Args:
        folder: The run folder.
        config: The resolved config, secrets masked.
        name: The run's name.
        group: The sweep that it belongs to, if any.
        job_type: The recipe's name.
        axes: What the sweep varies in this run, by key.
        goes_on: Whether it goes on in its folder after a stop; a tracker goes on with the same run then.
        logged: Lines that were logged before the checkpoint that it goes on from; those after them come again.
    """

    folder: Path
    config: Mapping[str, Any]
    name: str
    group: str | None
    job_type: str
    axes: Mapping[str, Any] = field(default_factory=dict)
    goes_on: bool = False
    logged: int = 0


class ActiveRun(ABC):
    """A run that is open at a tracker."""

    where: str = ""
    """A line that says where the run can be seen, for the terminal."""
    later: str = ""
    """What brings the tracker the rest, where it stops working; empty where nothing does."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers of one step."""

    @abstractmethod
    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Record the final numbers."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027 - not every tracker has tables
        """Record a table; every row has the same columns."""

    def adapter(self, folder: Path) -> None:  # noqa: B027 - not every tracker keeps files
        """Record the trained adapter."""

    @abstractmethod
    def finish(self, status: Ending) -> None:
        """Close the run as what it is."""


class Tracker(Section, ABC):
    """The keys that trackers share."""

    label: ClassVar[str]
    without_place: ClassVar[Mapping[tuple[str, ...], str]] = {}
    """Keys that this tracker has no place for, and where their values are instead."""
    target: str = Field(alias="_target_")
    project: str = Field(min_length=1)
    name: str | None
    group: str | None
    tags: list[str]
    notes: str | None
    log_adapter: bool

    @abstractmethod
    def start(self, info: RunInfo) -> ActiveRun:
        """Open a run."""

    def where_to_look(self, line: str) -> str:
        """Return the line for the terminal: where the run can be seen, and what became of keys without a place."""
        told = []
        for keys, instead in self.without_place.items():
            given = [f"tracker.{key}" for key in keys if getattr(self, key)]
            told += [f"{', '.join(given)}: {instead}"] if given else []
        return "; ".join([line, *told])


def by_split(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return logged numbers under the names that every tracker shows: `train/loss`, `eval/loss`."""
    return {f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": value for key, value in metrics.items()}


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables for the block; those that are set already keep the user's value."""
    added = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@dataclass
class Guarded(ActiveRun):
    """Hands calls on to a run until one fails; then says so once and goes on without.

    The run is closed all the same: what it has recorded so far is written then.
    """

    run: ActiveRun | None
    label: str
    failure: str | None = field(default=None)

    @property
    def working(self) -> ActiveRun | None:
        """The run, as long as nothing has failed."""
        return None if self.failure else self.run

    @classmethod
    def start(cls, tracker: Tracker, info: RunInfo) -> Guarded:
        """Open a run at `tracker`, or none where that fails."""
        guarded = cls(None, tracker.label)
        shown = {key: masked(getattr(tracker, key)) for key in SHOWN if key in type(tracker).model_fields}
        told = tracker.model_copy(update=shown)

        def open_run() -> None:
            guarded.run = told.start(info)
            guarded.where = guarded.run.where

        guarded._attempt(open_run)
        return guarded

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers of one step, if the tracker still works."""
        if self.working is not None:
            self._attempt(self.working.log, metrics, step)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Record the final numbers, if the tracker still works."""
        if self.working is not None:
            self._attempt(self.working.summarize, masked(summary))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table, if the tracker still works."""
        if self.working is not None and rows:
            self._attempt(self.working.table, name, masked(rows))

    def adapter(self, folder: Path) -> None:
        """Record the adapter, if the tracker still works."""
        if self.working is not None:
            self._attempt(self.working.adapter, folder)

    def finish(self, status: Ending) -> None:
        """Close the run."""
        if self.run is not None:
            self._attempt(self.run.finish, status)

    def _attempt(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the training goes on
            reason = " ".join(str(masked(str(error))).split()) or type(error).__name__
            if self.failure is not None:
                log.info("%s failed again: %s", self.label, reason)
                return
            later = f"; {self.run.later}" if self.run is not None and self.run.later else ""
            self.failure = f"{self.label} failed and is left out from here on: {reason}{later}"
            log.warning(self.failure)
