"""`python -m lora_exp.report <run folder>...`: print the result tables and write the pages of runs anew."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_exp.errors import USER_ERROR_STATUS, UserError, print_user_error
from lora_exp.reports.console import result_table
from lora_exp.reports.page import write_page
from lora_exp.reports.results import read_results


def show_result(folder: Path, table: bool = True) -> None:
    """Write `report.html` of a run folder and print its closing table."""
    results = read_results(folder)
    write_page(folder)
    if table:
        result_table(results)


def main() -> None:
    """Report every folder that the command line names."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders or "--help" in sys.argv[1:]:
        print("usage: python -m lora_exp.report <run folder> [<run folder> ...]")  # noqa: T201
        sys.exit(0 if folders else USER_ERROR_STATUS)
    try:
        for folder in folders:
            show_result(folder)
    except UserError as error:
        print_user_error(error)
        sys.exit(USER_ERROR_STATUS)


if __name__ == "__main__":
    main()
