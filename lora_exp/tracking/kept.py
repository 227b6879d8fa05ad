"""What a run folder keeps of its run at a tracker, so that a run that goes on is the same one there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lora_exp.run_folder import read_jsonl, to_json, write_whole
from lora_exp.tracking.base import RunInfo

FILE = "tracker.json"


def kept_id(info: RunInfo, tracker: str, new: str) -> str:
    """Return the id that a tracker knows the run by: the folder's where the run goes on, otherwise a new one.

    Args:
        info: The run.
        tracker: The tracker's name.
        new: The id to keep where there is none.
    """
    file = info.folder / FILE
    try:
        ids: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if info.goes_on else {}
    except (FileNotFoundError, json.JSONDecodeError):
        ids = {}
    if tracker not in ids:
        ids[tracker] = new
        write_whole(file, to_json(ids) + "\n")
    return str(ids[tracker])


def logged_before(info: RunInfo) -> Iterator[tuple[int, Mapping[str, float]]]:
    """Yield step and numbers of each line that was logged before the checkpoint that a run goes on from.

    A kill may have lost the last of them on their way to the tracker.
    """
    for line in read_jsonl(info.folder / "metrics.jsonl")[: info.logged]:
        step = line.pop("step")
        yield step, {key: value for key, value in line.items() if isinstance(value, int | float)}
