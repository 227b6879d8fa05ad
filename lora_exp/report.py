"""`python -m lora_exp.report <folder>...`: print the result tables and write the pages of runs and sweeps anew."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora_exp.errors import USER_ERROR_STATUS, Problem, UserError, print_user_error
from lora_exp.reports.console import leaderboard_table, result_table, say
from lora_exp.reports.page import PAGE, write_page
from lora_exp.reports.results import read_results
from lora_exp.reports.sweep_page import write_comparison, write_sweep


def show_result(folder: Path, table: bool = True) -> None:
    """Write `report.html` of a run folder and print its closing table."""
    results = read_results(folder)
    write_page(folder)
    if table:
        result_table(results)


def show_sweep(folder: Path, objective: str | None = None) -> None:
    """Write a sweep folder's leaderboard and page, as they stand now, and print the table."""
    leaderboard_table(write_sweep(folder, objective))
    say("report", str(folder / PAGE))


def show_comparison(page: Path, folders: list[Path], objective: str | None = None) -> None:
    """Write one page of several folders and print their table."""
    board = write_comparison(page, folders, objective)
    leaderboard_table(board)
    say("report", str(page))


def report(folders: list[Path], output: Path | None, objective: str | None) -> None:
    """Report what the command line names."""
    is_run = (folders[0] / "run.json").is_file()
    if len(folders) > 1 or output is not None:
        show_comparison(_page(output or Path("comparison.html")), folders, objective)
    elif is_run:
        show_result(folders[0])
    else:
        show_sweep(folders[0], objective)


def _page(output: Path) -> Path:
    page = output / PAGE if output.is_dir() else output
    if not page.parent.is_dir():
        raise UserError("the page cannot be written", [Problem("--output", f"there is no folder {page.parent}")])
    return page


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lora_exp.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders and sweep folders; several are compared")
    parser.add_argument("--output", type=Path, help="where the page of a comparison goes (comparison.html)")
    parser.add_argument("--objective", help="the final metric to compare by (the one that most of the runs name)")
    arguments = parser.parse_args()
    try:
        report(arguments.folders, arguments.output, arguments.objective)
    except UserError as error:
        print_user_error(error)
        sys.exit(USER_ERROR_STATUS)


if __name__ == "__main__":
    main()
