"""Trackio: a local SQLite file a project, which `trackio show` opens; nothing is sent anywhere.

Read in trackio 0.43. `trackio.init` prints a banner, keeps one run in the process and asks the hub who is logged in;
runs are made of its `Run` directly instead.
"""

from __future__ import annotations

import io
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from lora_exp.tracking.base import ActiveRun, Ending, RunInfo, Tracker, by_split
from lora_exp.tracking.kept import kept_id, logged_before


class TrackioRun(ActiveRun):
    """One `trackio.Run`."""

    def __init__(self, run: Any, where: str, log_adapter: bool) -> None:
        self.run = run
        self.where = where
        self.log_adapter = log_adapter
        self.step = 0
        self.known: set[tuple[str, int]] = set()
        """Names and steps that Trackio has from before a stop; it would keep them twice."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers under their section: `train/loss`, `eval/loss`."""
        self.step = step
        new = {name: value for name, value in by_split(metrics).items() if (name, step) not in self.known}
        if new:
            with _heard(self.run):
                self.run.log(new, step)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Record the numbers under `summary/` at the last step, and all of the summary in the config."""
        self.run.config["summary"] = dict(summary)
        numbers = {f"summary/{name}": value for name, value in summary.items() if isinstance(value, int | float)}
        with _heard(self.run):
            self.run.log(numbers, self.step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table at the last step."""
        from trackio import Table

        with _heard(self.run):
            columns = list(rows[0])
            self.run.log({name: Table(columns, [[row[column] for column in columns] for row in rows])}, self.step)

    def adapter(self, folder: Path) -> None:
        """Keep the artifact `adapter-<run>`, where `tracker.log_adapter` asks for it."""
        if self.log_adapter:
            with _heard(self.run):
                self.run.log_artifact(str(folder), name=f"adapter-{self.run.id}", type="model")

    def finish(self, status: Ending) -> None:
        """Close the run. Trackio knows no states: `status` stands in the config."""
        with _heard(self.run):
            self.run.flush()
            # The config is written with the first line that is waiting; so it comes once more, with what is new in it.
            self.run.config["status"] = status
            self.run._config_logged = False
            self.run.log({}, self.step)
            self.run.finish()


class Trackio(Tracker):
    """conf/tracker/trackio.yaml."""

    label = "trackio"
    package = ("trackio", "trackio")
    without_place = {("tags", "notes"): "Trackio shows them in the run's config only"}

    def start(self, info: RunInfo) -> ActiveRun:
        """Open a run in the project's file, or again the one that goes on."""
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.validate_project_name(self.project)
        config = {**info.config, **{f"sweep/{axis}": value for axis, value in info.axes.items()}}
        run = _local_run(
            url=None,
            client=None,
            project=self.project,
            run_id=kept_id(info, self.label, uuid.uuid4().hex),
            name=self.name or info.name,
            group=self.group or info.group,
            config=config,
        )
        where = self.where_to_look(f"trackio show --project {self.project}")
        active = TrackioRun(run, where, self.log_adapter)
        if info.goes_on:
            rows = SQLiteStorage.get_logs(self.project, run.name, run_id=run.id)
            active.known = {(name, row["step"]) for row in rows for name in row}
        for step, metrics in logged_before(info):
            active.log(metrics, step)
        return active


def _local_run(**arguments: Any) -> Any:
    from trackio import Run

    class LocalRun(Run):  # type: ignore[misc]
        """A run that asks the hub nothing, and keeps what it warns of for whoever calls next."""

        def __init__(self) -> None:
            self.lost: list[str] = []
            with redirect_stdout(io.StringIO()):
                super().__init__(**arguments)

        def _get_username(self) -> None:
            return None

        def _warn_once(self, _: str, message: str) -> None:
            self.lost.append(message)

        def flush(self) -> None:
            """Write now what otherwise waits for half a second."""
            with self._client_lock:
                self._flush_queues_inline()

    return LocalRun()


@contextmanager
def _heard(run: Any) -> Iterator[None]:
    """Keep the terminal clear of what Trackio prints, and raise what it only warns of: it has lost what it names."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    lost = [*run.lost, *(str(each.message) for each in caught if each.category is UserWarning)]
    run.lost.clear()
    if lost:
        raise OSError(lost[0])
