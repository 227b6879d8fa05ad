"""What a sweep says: its files after every trial, one table on the terminal, the best trial at the end."""

from __future__ import annotations

from pathlib import Path

from lora_exp.reports.console import leaderboard_table, say
from lora_exp.reports.page import PAGE
from lora_exp.reports.sweep_page import write_sweep
from lora_exp.sweeps.question import Question
from lora_exp.sweeps.summary_run import log_leaderboard


def tell(folder: Path) -> None:
    """Bring the sweep's files up to date and print the table."""
    question = Question.read(folder)
    leaderboard_table(write_sweep(folder), question.trials if question else 0)


def close(folder: Path, news: bool) -> None:
    """Say where the answer lies, once no trial is left to run.

    Args:
        folder: The sweep's.
        news: Whether this command ran any trial; only then the tracker is told.
    """
    board = write_sweep(folder)
    if news:
        log_leaderboard(folder, board)
    best = board.best
    if best is not None:
        say("adapter", str(best.best.folder / "adapter"))
    say("report", f"{folder / PAGE}, and leaderboard.csv, leaderboard.json")
