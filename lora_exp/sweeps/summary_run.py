"""The sweep at the tracker: beside the runs of its trials one of its own, with the leaderboard as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from lora_exp.reports.console import note
from lora_exp.sweeps.leaderboard import Leaderboard, as_rows
from lora_exp.tracking.base import Guarded, RunInfo, Tracker


def log_leaderboard(folder: Path, board: Leaderboard) -> None:
    """Open a run for the sweep, write the leaderboard to it, and close it.

    Args:
        folder: The sweep's.
        board: Its trials; the tracker is that of the best one.
    """
    best = board.best
    if best is None:
        return
    config = OmegaConf.load(best.best.folder / "config.yaml")
    try:
        # A secret stands there as the variable that it came from.
        section: Any = OmegaConf.to_container(OmegaConf.select(config, "tracker"), resolve=True)
        tracker = get_class(section["_target_"]).model_validate(section)  # type: ignore[attr-defined]
    except (ValidationError, OmegaConfBaseException):  # a trial of an earlier version, which had other keys
        note(f"the leaderboard is not at the tracker: {best.best.folder}/config.yaml is of another version")
        return
    assert isinstance(tracker, Tracker)
    group = group_of(folder)
    info = RunInfo(folder, {"axes": list(board.axes)}, f"{group} leaderboard", group, "sweep")
    run = Guarded.start(tracker, info)
    run.table("leaderboard", as_rows(board))
    objective = best.objective.mean if best.objective else None
    run.summarize({"objective": objective, "objective_name": board.objective_name, "best": dict(best.axes)})
    run.finish("finished")
    if run.failure:
        note(run.failure)


def group_of(sweep_dir: Path) -> str:
    """Return the name under which a tracker keeps the runs of a sweep together: its folder below `multirun/`."""
    return "_".join(sweep_dir.parts[1:]) or sweep_dir.name
