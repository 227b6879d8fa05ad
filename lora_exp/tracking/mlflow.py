"""MLflow: a local SQLite store beside the run folders, or a server.

Spoken to through MlflowClient, which keeps no active run in the process. Read in mlflow-skinny 3.17.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_exp.rules import flatten
from lora_exp.run_folder import to_json
from lora_exp.secrets.masking import masked
from lora_exp.tracking.base import ActiveRun, Ending, RunInfo, Tracker, by_split, environment
from lora_exp.tracking.kept import kept_id, logged_before

STATUS = {"finished": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}
"""As MLflow's own storage for Optuna translates them."""
VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    # Of a server: by default MLflow tries 8 times, for minutes each.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
MOST_PARAMS = 100
"""What one call takes."""
KEY = "lora_exp_run"
"""The tag that a run is found by where it goes on: MLflow's own id is not ours to choose."""
NOTES = "mlflow.note.content"
"""The tag that the interface shows as a run's description."""


class MLflowRun(ActiveRun):
    """One run of a store."""

    def __init__(self, client: Any, run_id: str, where: str, log_adapter: bool) -> None:
        self.client = client
        self.run_id = run_id
        self.where = where
        self.log_adapter = log_adapter
        self.step = 0
        self.known: set[tuple[str, int]] = set()
        """Names and steps that MLflow has from before a stop; it would keep them twice."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics under their section: `train/loss`, `eval/loss`."""
        self.step = step
        self._metrics(by_split(metrics))

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Record the numbers as metrics at the last step, and the rest as tags."""
        self._metrics({name: value for name, value in summary.items() if isinstance(value, int | float)})
        with _quietly():
            for name, value in summary.items():
                if value is not None and not isinstance(value, int | float):
                    self.client.set_tag(self.run_id, name, value if isinstance(value, str) else to_json(value, None))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a table as the artifact `<name>.json`, which the interface shows as one."""
        from pandas import DataFrame

        with _quietly():
            self.client.log_table(self.run_id, DataFrame(list(rows), dtype=object), f"{name}.json")

    def adapter(self, folder: Path) -> None:
        """Keep the adapter as the artifact `adapter`, where `tracker.log_adapter` asks for it."""
        if self.log_adapter:
            with _quietly():
                self.client.log_artifacts(self.run_id, str(folder), "adapter")

    def finish(self, status: Ending) -> None:
        """Close the run; a pruned one is KILLED at MLflow."""
        with _quietly():
            self.client.set_tag(self.run_id, "status", status)
            self.client.set_terminated(self.run_id, STATUS[status])

    def _metrics(self, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {name: value for name, value in values.items() if (name, self.step) not in self.known}
        with _quietly():
            self.client.log_batch(self.run_id, [Metric(name, value, now, self.step) for name, value in new.items()])


class MLflow(Tracker):
    """conf/tracker/mlflow.yaml."""

    label = "mlflow"
    package = ("mlflow", "mlflow")
    tracking_uri: str | None

    def start(self, info: RunInfo) -> ActiveRun:
        """Open a run in the experiment that is named as the project, or again the one that goes on."""
        key = kept_id(info, self.label, uuid.uuid4().hex)
        with _quietly():
            import mlflow

            client = mlflow.MlflowClient(self.tracking_uri or mlflow.get_tracking_uri())
            experiment = self._experiment(client)
            found = client.search_runs([experiment], f"tags.{KEY} = '{key}'") if info.goes_on else []
            run_id = found[0].info.run_id if found else self._new_run(client, experiment, info, key)
        where = self.where_to_look(f"mlflow, experiment {self.project} in {masked(client.tracking_uri)}")
        active = MLflowRun(client, run_id, where, self.log_adapter)
        if found:
            with _quietly():
                client.update_run(run_id, status="RUNNING")
                histories = (client.get_metric_history(run_id, name) for name in found[0].data.metrics)
                active.known = {(each.key, each.step) for history in histories for each in history}
        for step, metrics in logged_before(info):
            active.log(metrics, step)
        return active

    def _new_run(self, client: Any, experiment: str, info: RunInfo, key: str) -> str:
        tags = {**self._tags(info), KEY: key}
        run_id = str(client.create_run(experiment, tags=tags, run_name=self.name or info.name).info.run_id)
        params = _params(info)
        for first in range(0, len(params), MOST_PARAMS):
            client.log_batch(run_id, params=params[first : first + MOST_PARAMS])
        return run_id

    def _experiment(self, client: Any) -> str:
        """Return the experiment's id; two runs may make it at the same time."""
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.project)
        if found is None:
            try:
                return str(client.create_experiment(self.project))
            except MlflowException:
                found = client.get_experiment_by_name(self.project)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _tags(self, info: RunInfo) -> dict[str, str]:
        tags = {
            "group": self.group or info.group,
            "job_type": info.job_type,
            "tags": ", ".join(self.tags),
            "folder": str(info.folder),
            NOTES: self.notes,
        }
        return {key: value for key, value in tags.items() if value}


def _params(info: RunInfo) -> list[Any]:
    """Return the config's leaves by dotted key, and what the sweep varies; MLflow keeps every value as a text."""
    from mlflow.entities import Param

    leaves = {key: value for key, value in flatten(info.config).items() if not isinstance(value, Mapping)}
    values = {**leaves, **{f"sweep/{axis}": value for axis, value in info.axes.items()}}
    # In a name MLflow takes these characters only.
    return [Param(re.sub(r"[^\w.:/ -]", "_", key), _text(value)) for key, value in values.items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value, None)


@contextmanager
def _quietly() -> Iterator[None]:
    """No telemetry, no hints, and bounded waits for a server; nothing of it stays in the environment."""
    with environment(**VARIABLES):
        yield
