"""Writes RESULTS.md: the table that was last printed, with the machine named."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lora_exp.errors import count
from lora_exp.machine import device_facts
from lora_exp.provenance import versions

RESULTS = Path(__file__).with_name("RESULTS.md")
SWEEP = "\n## Sweep\n"


def write_results(table: Table, counts: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Write the table as Markdown."""
    facts = device_facts(device)
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [
        "# Results",
        "",
        f"{table.title}.",
        "",
        f"Machine: {facts['name']}, {facts['threads']} threads, {platform.system()}; {packages}.",
        f"Rows: {counts['short']} short (100 to 250 tokens), {counts['all']} in all; batch 8, max_length 512, "
        "LoRA r=16 on all linear layers of SmolLM2-135M-Instruct, no gradient checkpointing. lora_exp on the allocator "
        "that its command starts with (mimalloc on Linux), TRL on the system's.",
        f"{count(arguments.repeats, 'pair')} of processes by turns, {arguments.steps} timed steps each; means of the "
        "steps, medians of the pairs, and the least and greatest ratio of a pair. "
        "`python -m benchmarks.compare --rows FOLDER --write`",
        "",
        *markdown(table),
    ]
    _, heading, sweep = _parts()
    RESULTS.write_text("\n".join(lines) + "\n" + heading + sweep, encoding="utf-8")


def markdown(table: Table) -> list[str]:
    """Return the lines of a table."""
    cells = [list(column.cells) for column in table.columns]
    return [
        "| " + " | ".join(str(column.header) for column in table.columns) + " |",
        "|" + "---|" * len(table.columns),
        *("| " + " | ".join(map(str, row)) + " |" for row in zip(*cells, strict=True)),
    ]


def append_sweep(line: str) -> None:
    """Add the figures of a sweep, in place of earlier ones."""
    table, _, _ = _parts()
    RESULTS.write_text(f"{table.rstrip()}\n{SWEEP}\n{line}\n", encoding="utf-8")


def _parts() -> tuple[str, str, str]:
    """Return the table, the heading of the sweep, and what stands below it."""
    return (RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else "# Results\n").partition(SWEEP)
