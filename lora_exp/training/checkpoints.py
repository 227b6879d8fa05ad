"""Checkpoints in a run folder."""

from __future__ import annotations

from pathlib import Path

from lora_exp.errors import Problem, UserError

NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
"""What Trainer writes beside the adapter; without them a resume would not be the same run."""


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint with the highest step that is whole, or None."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return next((path for path in reversed(found) if all((path / name).is_file() for name in NEEDED)), None)


def checkpoint_to_resume(resume: str | None) -> Path | None:
    """Return the checkpoint that `resume=<run folder>` goes on from; None without `resume`.

    Raises:
        UserError: If the folder has no whole checkpoint.
    """
    if resume is None:
        return None
    checkpoint = newest_checkpoint(Path(resume) / "checkpoints")
    if checkpoint is None:
        problem = Problem("resume", f"{resume} has no checkpoint to go on from", "start it again with output_dir=...")
        raise UserError("the run cannot be resumed", [problem])
    return checkpoint
