"""Weights & Biases: online for who is logged in, otherwise offline in the run folder, for `wandb sync`."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir, nullcontext
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from pydantic import Field

from lora_exp.secrets.home import WANDB_HERE, netrc_passwords
from lora_exp.tracking.base import ActiveRun, Ending, RunInfo, Tracker, by_split
from lora_exp.tracking.kept import kept_id, logged_before

ASK_AGAIN = 600.0
"""Seconds for which the runs of this process stay offline after one that could not be opened online.

Otherwise every trial of a sweep would wait for it anew.
"""

_online_failed: tuple[float, str] | None = None
"""When a run could last not be opened online, and why."""


class WandbRun(ActiveRun):
    """One `wandb.Run`.

    Each line has its number as W&B's step: W&B leaves out a number that it has, so a line that comes again after a
    resume stands there once.
    """

    def __init__(self, run: Any, where: str, log_adapter: bool) -> None:
        self.run = run
        self.where = where
        self.log_adapter = log_adapter
        self.lines = 0
        self.later = (
            f"later: wandb sync --include-online {run.settings.sync_dir}" if run.settings.mode != "disabled" else ""
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers under their section: `train/loss`, `eval/loss`."""
        self._log({**by_split(metrics), "train/global_step": step})

    def _log(self, line: Mapping[str, Any]) -> None:
        self.run.log(dict(line), step=self.lines, commit=True)
        self.lines += 1

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Write to the run's summary."""
        self.run.summary.update(dict(summary))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a table."""
        from wandb import Table

        columns = list(rows[0])
        self._log({name: Table(columns, [[row[column] for column in columns] for row in rows])})

    def adapter(self, folder: Path) -> None:
        """Log the artifact `adapter-<run>`, where `tracker.log_adapter` asks for it."""
        if self.log_adapter:
            self.run.log_artifact(str(folder), name=f"adapter-{self.run.id}", type="model")

    def finish(self, status: Ending) -> None:
        """Close the run. W&B knows finished and failed; a pruned one is finished, with the tag `pruned`.

        Raises:
            TimeoutError: If the server has not taken everything within `tracker.finish_timeout`.
        """
        self.run.summary["status"] = status
        if status == "pruned":
            self.run.tags = (*self.run.tags, "pruned")
        self.run.finish(exit_code=1 if status == "failed" else 0)


class Wandb(Tracker):
    """conf/tracker/wandb.yaml."""

    label = "wandb"
    mode: Literal["online", "offline", "disabled"] | None
    entity: str | None
    init_timeout: float = Field(gt=0)
    finish_timeout: float = Field(gt=0)

    def start(self, info: RunInfo) -> ActiveRun:
        """Open a run of its own, whatever other run this process has had; offline where online fails.

        A run that goes on is the same one at W&B: online it is resumed; offline its record is written anew from the
        first line, for W&B appends no record to another.
        """
        import wandb
        from wandb.sdk.lib.runid import generate_id

        set_up(wandb)
        run_id = kept_id(info, self.label, generate_id())
        mode, why = self._mode()
        try:
            run = self._open(wandb, info, mode, run_id)
        except wandb.Error as error:
            if mode != "online":
                raise
            mode, why = "offline", _remember(str(error).splitlines()[0])
            wandb.teardown(exit_code=1)  # its process keeps the id of a run that could not be opened
            set_up(wandb)
            run = self._open(wandb, info, mode, run_id)
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step")
        active = WandbRun(run, self._where(info, run, mode, why), self.log_adapter)
        for step, metrics in logged_before(info):
            active.log(metrics, step)
        if mode == "offline":
            _remove_earlier(info.folder, run)
        return active

    @staticmethod
    def _where(info: RunInfo, run: Any, mode: str, why: str) -> str:
        if mode == "online":
            return f"wandb online: {run.url}"
        later = "" if mode == "disabled" else f"; later: wandb sync {info.folder}/wandb/offline-run-*"
        return f"wandb {mode} ({why}){later}"

    def _open(self, wandb: Any, info: RunInfo, mode: str, run_id: str) -> Any:
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
        )
        return wandb.init(
            id=run_id,
            resume="allow" if info.goes_on and mode == "online" else None,
            project=self.project,
            entity=self.entity,
            name=self.name or info.name,
            group=self.group or info.group,
            job_type=info.job_type,
            tags=self.tags,
            notes=self.notes,
            config={**info.config, **{f"sweep/{axis}": value for axis, value in info.axes.items()}},
            dir=str(info.folder.absolute()),  # the process of W&B may have another working folder
            mode=mode,
            reinit="create_new",
            settings=settings,
        )

    def _mode(self) -> tuple[str, str]:
        """Return the mode and the reason for it."""
        mode, why = self._wanted_mode()
        if mode == "online" and _online_failed is not None and time.monotonic() - _online_failed[0] < ASK_AGAIN:
            return "offline", _online_failed[1]
        return mode, why

    def _wanted_mode(self) -> tuple[str, str]:
        if self.mode is not None:
            return self.mode, f"tracker.mode={self.mode}"
        if from_environment := os.environ.get("WANDB_MODE"):
            return from_environment, f"WANDB_MODE={from_environment}"
        return ("online", "logged in") if logged_in() else ("offline", "not logged in")


def set_up(wandb: Any) -> None:
    """Start W&B in this process, silently: a login speaks before there is a run.

    It reads its settings of the working folder whatever a variable says (`sdk/wandb_setup.py` of 0.31). Where they
    cannot be read it starts in another folder, one that no other user can write to: settings name the server.
    """
    hidden = os.environ.get(WANDB_HERE) == os.devnull
    if hidden and not os.access(".", os.X_OK):
        os.chdir(Path(os.devnull).parent)  # for good: nothing can be found from here, and there is no way back
    with chdir(Path(os.devnull).parent) if hidden else nullcontext():
        wandb.setup(wandb.Settings(silent=True))


def _remove_earlier(folder: Path, run: Any) -> None:
    """Remove the offline records of the same run that this one holds too, some of them torn by a kill."""
    this = Path(run.settings.sync_dir).resolve()
    for record in (folder / "wandb").glob(f"offline-run-*-{run.id}"):
        if record.resolve() != this:
            shutil.rmtree(record, ignore_errors=True)


def _remember(reason: str) -> str:
    """Have the next runs of this process not wait for the server; return what to say."""
    global _online_failed
    why = f"online failed: {reason}"
    _online_failed = time.monotonic(), why
    return why


def logged_in() -> bool:
    """Whether W&B would find a key without asking: in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    keys = netrc_passwords()
    return bool(keys.get(host, keys.get("default")))
