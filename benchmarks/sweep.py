"""A sweep over eight betas, from start to end: one multirun here, eight runs of TRL alone.

    python -m benchmarks.sweep --rows FOLDER [--steps 4] [--write]

Both pay for everything: start-up, loading, tokenising, references, training. TRL computes its reference in each step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.case import MODEL, Case
from benchmarks.compare import HERE, run_worker
from benchmarks.results import append_sweep
from benchmarks.rows import write_rows

BETAS = (0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


def sweep_here(case: Case, folder: Path) -> float:
    """Return the seconds of one multirun over the betas, with an empty store."""
    overrides = [item for item in case.overrides(folder) if not item.startswith(("output_dir=", "recipe.beta="))]
    command = [sys.executable, "-m", "lora_exp", "-m", *overrides, f"recipe.beta={','.join(map(str, BETAS))}"]
    command += [f"hydra.sweep.dir={folder}/sweep", f"store.path={folder}/reference.sqlite3"]
    return _seconds(command)


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=environment, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    return time.perf_counter() - start


def sweep_trl(case: Case) -> float:
    """Return the seconds of eight runs of TRL alone, one after the other."""
    start = time.perf_counter()
    for beta in BETAS:
        run_worker("with_trl", replace(case, beta=beta))
    return time.perf_counter() - start


def main() -> None:
    """Run both and print the ratio."""
    from transformers import AutoTokenizer

    from lora_exp.models.source import cache_dir

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a job")
    parser.add_argument("--write", action="store_true", help="add the figures to RESULTS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = AutoTokenizer.from_pretrained(cache_dir() / "models" / MODEL.replace("/", "--"))
        write_rows(arguments.rows.resolve(), folder / "short", tokenizer, "short")
        case = Case("dpo", "none", "bfloat16", folder / "short", steps=arguments.steps - 1)
        here, trl = sweep_here(case, folder), sweep_trl(case)
    line = (
        f"Sweep over {len(BETAS)} betas, {arguments.steps} steps a job, bf16, short rows, from start to end: "
        f"{here:.0f} s here, {trl:.0f} s in {len(BETAS)} runs of TRL alone: {trl / here:.1f} times faster."
    )
    print(line)  # noqa: T201
    if arguments.write:
        append_sweep(line)


if __name__ == "__main__":
    main()
