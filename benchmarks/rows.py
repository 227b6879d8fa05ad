"""The rows that both sides train on: real ones where `ROWS` names a folder with them, else the packaged sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.case import BATCH

SHORT = (100, 250)
"""Tokens of a row in the short set: prompt and the longer answer."""


def write_rows(source: Path, folder: Path, tokenizer: Any, kind: str) -> dict[str, int]:
    """Write `train` rows for both recipes into a folder as `data=splits` reads it.

    Args:
        source: A folder of `train.jsonl`, `train.dpo.jsonl` and perhaps `conversations.dpo.jsonl`.
        folder: Where the chosen rows go.
        tokenizer: Measures them.
        kind: `short` (100 to 250 tokens) or `all`.

    Returns:
        Rows by file name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [*_read(source / "train.dpo.jsonl"), *map(_flat, _read(source / "conversations.dpo.jsonl"))]
    rows = {
        "train.dpo.jsonl": [row for row in pairs if _wanted(kind, tokenizer, row, ("chosen", "rejected"))],
        "train.jsonl": [row for row in _read(source / "train.jsonl") if _wanted(kind, tokenizer, _text(row), ("a",))],
    }
    # Whole batches, so that every timed step is one of eight rows.
    rows = {name: chosen[: len(chosen) // BATCH * BATCH or None] for name, chosen in rows.items()}
    for name, chosen in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return {name: len(chosen) for name, chosen in rows.items()}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _flat(row: dict[str, Any]) -> dict[str, str]:
    """Return a conversation as strings: earlier turns are part of the prompt."""
    turns = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
    return {"prompt": turns, **{name: row[name][-1]["content"] for name in ("chosen", "rejected")}}


def _text(row: dict[str, Any]) -> dict[str, str]:
    inputs = row["inputs"]
    return {"prompt": f"{inputs['question']} {inputs.get('context') or ''}", "a": row["outputs"]["answer"]}


def _wanted(kind: str, tokenizer: Any, row: dict[str, str], answers: tuple[str, ...]) -> bool:
    if kind == "all":
        return True
    length = len(tokenizer(row["prompt"])["input_ids"]) + max(len(tokenizer(row[a])["input_ids"]) for a in answers)
    return SHORT[0] <= length <= SHORT[1]
