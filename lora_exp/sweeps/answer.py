"""What a sweep says: its files after every trial, one table on the terminal, the best trial at the end."""

from __future__ import annotations

from pathlib import Path

from lora_exp.errors import UserError
from lora_exp.reports import console
from lora_exp.sweeps.leaderboard import Leaderboard, write_leaderboard
from lora_exp.sweeps.question import Question
from lora_exp.sweeps.trials import Trial, read_trials, trial_folders


def update(folder: Path) -> Leaderboard | None:
    """Bring the sweep's files up to date; None while it has no trial."""
    try:
        folders = trial_folders([folder])
    except UserError:
        return None
    board = Leaderboard.of(read_trials(folders))
    write_leaderboard(folder, board)
    return board


def tell(folder: Path) -> None:
    """Update the files and print the table."""
    board = update(folder)
    if board is not None:
        question = Question.read(folder)
        console.standings_table(board, question.trials if question else 0)


def close(folder: Path) -> None:
    """Print the answer, once no trial is left to run."""
    board = update(folder)
    if board is None:
        return
    best = board.standings[0]
    if best.objective is not None:
        console.say("best", best.name)
        console.say("adapter", str(_best_trial(board).folder / "adapter"))
    if board.tie:
        console.note(board.tie)
    console.say("table", f"{folder / 'leaderboard.csv'}, and .json")


def _best_trial(board: Leaderboard) -> Trial:
    """Return the best repetition of the best point."""
    sign = 1 if board.direction == "minimize" else -1
    finished = [trial for trial in board.standings[0].trials if trial.objective is not None]
    return min(finished, key=lambda trial: sign * (trial.objective or 0.0))
