"""TensorBoard: event files in the run folder; a folder above shows all the runs that lie in it.

Written with torch's SummaryWriter, that is with TensorBoard's own writer, which raises where a file cannot be written.
tensorboardX is lighter, but there the run would wait for ever on a queue that nobody empties any more. Read in
torch 2.13, tensorboard 2.21, tensorboardX 2.6.5.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lora_exp.rules import flatten
from lora_exp.run_folder import to_json
from lora_exp.tracking.base import ActiveRun, Ending, RunInfo, Tracker, by_split
from lora_exp.tracking.kept import logged_before

FOLDER = "tensorboard"
OBJECTIVE = "summary/objective"


class TensorBoardRun(ActiveRun):
    """One folder of event files."""

    def __init__(self, writer: Any, where: str) -> None:
        self.writer = writer
        self.where = where
        self.step = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars under their section: `train/loss`, `eval/loss`; on disk when this returns."""
        self.step = step
        for name, value in by_split(metrics).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Write the numbers as scalars under `summary/`, which the table of hyperparameters shows; the rest as text."""
        for name, value in summary.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"summary/{name}", value, self.step)
            elif value is not None:
                self.writer.add_text(f"summary/{name}", str(value), self.step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a table of text, its header first."""
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        self.writer.file_writer.add_summary(_text_table(name, cells), self.step)

    def finish(self, status: Ending) -> None:
        """Close the files. TensorBoard knows success and failure; the text `status` tells a pruned run."""
        self.writer.add_text("status", status, self.step)
        self.writer.file_writer.add_summary(_session_end(status))
        self.writer.close()


class TensorBoard(Tracker):
    """conf/tracker/tensorboard.yaml."""

    label = "tensorboard"
    package = ("tensorboard", "tensorboard")
    without_place = {("log_adapter",): "TensorBoard keeps no files, the adapter is in the run folder only"}

    def start(self, info: RunInfo) -> ActiveRun:
        """Open an event file in the run folder; where the run goes on it is written anew from the first line."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the imports: nobody here can act on them
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams

        folder = info.folder / FOLDER
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        writer = SummaryWriter(str(folder), flush_secs=10)
        about = {
            "project": self.project,
            "name": self.name or info.name,
            "group": self.group or info.group,
            "job_type": info.job_type,
            "tags": ", ".join(self.tags),
            "notes": self.notes,
        }
        rows = [["key", "value"], *([key, value] for key, value in about.items() if value)]
        writer.file_writer.add_summary(_text_table("run", rows), 0)
        writer.add_text("config", "\n".join(f"    {line}" for line in to_json(info.config).splitlines()), 0)
        for each in hparams(_hyperparameters(info), {OBJECTIVE: None})[:2]:  # the third would say that it ended well
            writer.file_writer.add_summary(each)
        above = folder.parent.parent if info.group else folder.parent
        active = TensorBoardRun(writer, self.where_to_look(f"tensorboard --logdir {above}"))
        for step, metrics in logged_before(info):
            active.log(metrics, step)
        return active


def _hyperparameters(info: RunInfo) -> dict[str, Any]:
    """Return what TensorBoard's table has a column for: what the sweep varies, or else all of the config but lists.

    The table shows the first five columns of many by their names; a sweep's would not be among them.
    """
    if info.axes:
        values = {f"sweep/{axis}": value for axis, value in info.axes.items()}
        return {key: json.dumps(value) if isinstance(value, list) else value for key, value in values.items()}
    return {key: value for key, value in flatten(info.config).items() if not isinstance(value, Mapping | list)}


def _text_table(name: str, cells: Sequence[Sequence[Any]]) -> Any:
    """Return a summary that TensorBoard shows as a table: a tensor of strings with two dimensions."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    texts = [["" if cell is None else str(cell) for cell in row] for row in cells]
    metadata = create_summary_metadata(display_name=name, description="")
    return Summary(value=[Summary.Value(tag=name, metadata=metadata, tensor=make_tensor_proto(texts))])


def _session_end(status: Ending) -> Any:
    """Return the summary that ends a run in the table of hyperparameters."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG, create_summary_metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    ended = SessionEndInfo(status=Status.Value("STATUS_FAILURE" if status == "failed" else "STATUS_SUCCESS"))
    metadata = create_summary_metadata(HParamsPluginData(session_end_info=ended))
    return Summary(value=[Summary.Value(tag=SESSION_END_INFO_TAG, metadata=metadata)])
