"""`python -m lora_exp.store list|check|clear [identity]`: look at the reference store, check it, make room in it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lora_exp.engine.store import ReferenceStore, StoredModel, default_path
from lora_exp.errors import USER_ERROR_STATUS, UserError, count, print_user_error
from lora_exp.reports.console import console, note

UNSOUND_STATUS = 1
SHORT = 12
"""Characters of an identity that are shown; `clear` takes any beginning that only one model has."""

SHOWN = 20
"""Problems that are shown one by one."""

UNLIMITED = 10_000
DESCRIBED = ("model", "quant", "dtype", "adapter", "engine")
ALWAYS_SHOWN = "torch"
"""The library whose version is shown of every model; of another one where models differ in it."""


def list_models(store: ReferenceStore) -> int:
    """Print a line for each model and one for all."""
    models = store.summary()
    table = Table(box=SIMPLE_HEAD)
    table.add_column("identity", no_wrap=True)
    for column in (*DESCRIBED, "versions"):
        table.add_column(column, overflow="fold")
    for column in ("rows", "size", "last used"):
        table.add_column(column, justify="right", no_wrap=True)
    libraries = _shown_libraries(models)
    for model in models:
        table.add_row(*(Text(cell) for cell in _cells(model, libraries)))
    if not console.is_terminal:  # a pipe is as wide as its lines
        console.width = UNLIMITED
    if models:
        console.print(table)
    _say(f"{_total(models)} in {store.path}")
    without = [model for model in models if not model.versions]
    if without:
        note(f"no run reads {_total(without)}: an earlier lora_exp stored them without the versions of the libraries")
    return 0


def _shown_libraries(models: list[StoredModel]) -> list[str]:
    versions = [model.versions for model in models if model.versions]
    names = dict.fromkeys(name for each in versions for name in each)
    return [name for name in names if name == ALWAYS_SHOWN or len({str(each.get(name)) for each in versions}) > 1]


def _cells(model: StoredModel, libraries: list[str]) -> list[str]:
    described = ["-" if model.description.get(key) is None else str(model.description[key]) for key in DESCRIBED]
    versions = ", ".join(f"{name} {model.versions.get(name)}" for name in libraries) if model.versions else "-"
    last_used = f"{model.last_used.astimezone():%Y-%m-%d %H:%M}"
    return [model.identity[:SHORT], *described, versions, f"{model.rows:,}", human_size(model.bytes), last_used]


def _total(models: list[StoredModel]) -> str:
    rows, size = sum(model.rows for model in models), sum(model.bytes for model in models)
    return f"{count(rows, 'row')} of {count(len(models), 'model')}, {human_size(size)}"


def human_size(number: int) -> str:
    """Return `512 B`, `1.5 KiB`, `20.0 GiB`."""
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def check(store: ReferenceStore) -> int:
    """Print what is wrong in the store, or that nothing is."""
    problems = [*([store.note] if store.note else []), *store.check()]
    if not problems:
        models = store.summary()
        _say(f"sound: {count(sum(model.rows for model in models), 'row')} of {count(len(models), 'model')}")
        return 0
    _say(f"{count(len(problems), 'problem')} in {store.path}")
    for problem in problems[:SHOWN]:
        _say(f"  {problem}")
    if len(problems) > SHOWN:
        _say(f"  and {len(problems) - SHOWN:,} more")
    return UNSOUND_STATUS


def clear(store: ReferenceStore, identity: str | None) -> int:
    """Remove what is stored of one model, or of all, and say how much that was."""
    before = sum(model.bytes for model in store.summary())
    rows = store.clear(identity)
    size = before - sum(model.bytes for model in store.summary())
    _say(f"{count(rows, 'row')} of {human_size(size)} removed from {store.path}")
    return 0


def _say(line: str) -> None:
    console.print(Text(line))


def run(command: str, identity: str | None, path: Path) -> int:
    """Do what the command line asks for and return the exit status; makes no store where there is none."""
    if not path.exists():
        _say(f"no store at {path} yet")
        return 0
    with ReferenceStore(path, max_size=sys.maxsize) as store:
        if command == "check":
            return check(store)
        try:
            return list_models(store) if command == "list" else clear(store, identity)
        finally:  # damage may also show only when the rows are read
            if store.note:
                note(store.note)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lora_exp.store", description="Look after the reference store.")
    parser.add_argument("command", choices=("list", "check", "clear"))
    parser.add_argument("identity", nargs="?", help="for clear: the model, or the beginning of its identity")
    parser.add_argument("--path", type=Path, metavar="FILE", help="the store, where it is not in the user's cache")
    arguments = parser.parse_args()
    if arguments.identity is not None and arguments.command != "clear":
        parser.error(f"{arguments.command} takes no identity")
    try:
        sys.exit(run(arguments.command, arguments.identity, arguments.path or default_path()))
    except UserError as error:
        print_user_error(error)
        sys.exit(USER_ERROR_STATUS)


if __name__ == "__main__":
    main()
