"""This project against TRL alone: the same rows in the same order, the same weights, the same optimiser step.

    python -m benchmarks.compare [--rows FOLDER] [--repeats 3] [--steps 3] [--only dpo] [--write]

Each side runs in a process of its own, by turns; ratios are of the times that two neighbours took for the same steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.case import Case

HERE = Path(__file__).parent
SIDES = ("with_trl", "with_lora_exp")


@dataclass(frozen=True)
class Outcome:
    """What paired runs of a case gave: seconds a step and peak bytes by side, and the ratios by pair."""

    seconds: dict[str, list[float]]
    peaks: dict[str, list[int]]
    steps: dict[str, Any]

    @property
    def ratios(self) -> list[float]:
        """TRL's seconds by ours, a pair each."""
        return [trl / ours for trl, ours in zip(*self.seconds.values(), strict=True)]

    @property
    def memory(self) -> float:
        """Our peak as a share of TRL's."""
        trl, ours = (median(values) for values in self.peaks.values())
        return ours / trl


def run_pairs(case: Case, repeats: int) -> Outcome:
    """Run both sides by turns."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, list[int]] = {side: [] for side in SIDES}
    last: dict[str, Any] = {}
    for _ in range(repeats):
        for side in SIDES:
            found = run_worker(side, case)
            seconds[side].append(fmean(found["seconds"]))
            peaks[side].append(found["peak_bytes"])
            last[side] = found
    return Outcome(seconds, peaks, last)


def run_worker(side: str, case: Case) -> dict[str, Any]:
    """Run one side in a process of its own and return what it reports."""
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{side}", *case.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)  # noqa: S603
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if done.returncode or not lines:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def table_of(rows: Sequence[tuple[str, Case, Outcome]], rates: dict[str, float]) -> Table:
    """Return the table of outcomes."""
    table = Table(title=f"lora_exp against TRL alone; GEMM {_rates(rates)}", title_justify="left")
    for column in ("case", "TRL s/step", "lora_exp s/step", "times faster", "memory", "tokens/s", "share of GEMM rate"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, case, outcome in rows:
        table.add_row(*_cells(name, case, outcome, rates))
    return table


def _cells(name: str, case: Case, outcome: Outcome, rates: dict[str, float]) -> list[str]:
    trl, ours = (median(values) for values in outcome.seconds.values())
    ratios = sorted(outcome.ratios)
    tokens = outcome.steps["with_lora_exp"]["tokens"]
    share = outcome.steps["with_lora_exp"].get("operations", 0) / ours / rates[case.dtype]
    return [
        name,
        f"{trl:.1f}",
        f"{ours:.2f}",
        f"{median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})",
        f"{outcome.memory:.2f} ({_gigabytes(outcome, 1)} of {_gigabytes(outcome, 0)})",
        f"{tokens / ours:,.0f}",
        f"{share:.0%}" if case.quant == "none" else "",
    ]


def _gigabytes(outcome: Outcome, side: int) -> str:
    return f"{median(outcome.peaks[SIDES[side]]) / 2**30:.1f} GiB"


def _rates(rates: dict[str, float]) -> str:
    return ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in rates.items())


def cases(folder: Path, steps: int) -> list[tuple[str, Case]]:
    """Return the cells of the table by name."""
    short = Case("dpo", "none", "bfloat16", folder / "short", steps=steps)
    long = replace(short, rows=folder / "all")
    sft = replace(short, recipe="sft")
    return [
        ("dpo bf16, short rows", short),
        ("dpo bf16, short rows, reference precomputed", replace(short, reference="precomputed")),
        ("sft bf16, short rows", sft),
        ("dpo fp32, short rows", replace(short, dtype="float32")),
        ("dpo 8bit, short rows", replace(short, quant="8bit")),
        ("dpo 4bit, short rows", replace(short, quant="4bit")),
        ("sft fp32, short rows", replace(sft, dtype="float32")),
        ("sft 8bit, short rows", replace(sft, quant="8bit")),
        ("sft 4bit, short rows", replace(sft, quant="4bit")),
        ("sft bf16, all rows", replace(sft, rows=folder / "all")),
        ("dpo bf16, all rows", long),
    ]


def main() -> None:
    """Run the cases and print the table."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks.case import MODEL
    from benchmarks.machine import gemm_rate
    from benchmarks.results import write_results
    from benchmarks.rows import write_rows
    from lora_exp.models.source import cache_dir

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="folder of train.jsonl and train.dpo.jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    arguments = parser.parse_args()

    console = Console(width=170)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = AutoTokenizer.from_pretrained(cache_dir() / "models" / MODEL.replace("/", "--"))
        counts = {
            kind: write_rows(arguments.rows.resolve(), Path(scratch) / kind, tokenizer, kind)
            for kind in ("short", "all")
        }
        console.print(counts)
        rates = {"bfloat16": 0.0, "float32": 0.0}
        rows = []
        for name, case in cases(Path(scratch), arguments.steps):
            if arguments.only in name:
                rows.append((name, case, run_pairs(case, arguments.repeats)))
                # What the machine can do at best: at some moments others use it too.
                rates = {name: max(rate, gemm_rate(getattr(torch, name), device)) for name, rate in rates.items()}
                console.print(table_of(rows[-1:], rates))
                if arguments.write:  # after each case: what was measured is not lost with what follows
                    write_results(table_of(rows, rates), counts, arguments, device)
    console.print(table_of(rows, rates))


if __name__ == "__main__":
    main()
