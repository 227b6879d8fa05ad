"""The memory estimate against the measured peak: `python -m benchmarks.memory` writes MEMORY.md.

Each case is a run of a few steps in a process of its own; `run.json` holds what was estimated before its weights were
loaded, and the most that the process held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_exp.provenance import versions

RESULTS = Path(__file__).with_name("MEMORY.md")
ALLOWED = 0.15
STEPS = 4

TINY, SMOL = "model=tiny", "model=smollm2_135m"
BF16, FP32 = "trainer.bf16=true", "trainer.bf16=false"
BATCH = "trainer.per_device_train_batch_size"
CHECKPOINTING = "trainer.gradient_checkpointing=true"
CASES = (
    (TINY, "recipe=sft", BF16),
    (TINY, "recipe=dpo", FP32),
    (TINY, "recipe=sft", FP32, "engine=padded"),
    (SMOL, "recipe=sft", BF16),
    (SMOL, "recipe=dpo", BF16, "quant=8bit"),
    (SMOL, "recipe=sft", BF16, "engine=padded", f"{BATCH}=4"),
    (SMOL, "recipe=sft", BF16, CHECKPOINTING),
    (SMOL, "recipe=dpo", BF16),
    (SMOL, "recipe=sft", BF16, "quant=4bit"),
    (SMOL, "recipe=dpo", BF16, "engine=padded", f"{BATCH}=2"),
    (SMOL, "recipe=sft", FP32),
    (SMOL, "recipe=sft", BF16, "engine.tokens_per_microbatch=512"),
    (SMOL, "recipe=sft", BF16, "recipe.max_length=96", f"{BATCH}=4"),
    (SMOL, "recipe=dpo", FP32, "quant=4bit"),
    (SMOL, "recipe=sft", BF16, "lora.r=64", f"{BATCH}=16"),
    (SMOL, "recipe=dpo", BF16, f"{BATCH}=4", "recipe.max_length=160"),
)
FITTED = 9
"""What an allocator keeps (`preflight/memory.py`) was fitted to the first of them; the others are predictions."""

COMMON = (
    "tracker=none",
    "samples.num_prompts=0",
    "trainer.eval_strategy=no",
    "trainer.save_strategy=no",
    "data.max_dropped_share=null",
    f"trainer.max_steps={STEPS}",
)


def measure(case: tuple[str, ...]) -> dict[str, Any]:
    """Return the `run.json` of a case."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, "-m", "lora_exp", *case, *COMMON, f"output_dir={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            sys.exit(f"{' '.join(case)} failed:\n{done.stderr}")
        found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return found


def row(case: tuple[str, ...], found: dict[str, Any]) -> tuple[str, float]:
    """Return a line of the table, and by how much the estimate is off."""
    estimate, peak = found["estimated_memory_bytes"], found["peak_memory_bytes"]
    error = estimate / peak - 1
    return f"| `{' '.join(case)}` | {estimate / 2**20:,.0f} | {peak / 2**20:,.0f} | {error:+.1%} |", error


def main() -> None:
    """Measure every case, or those that `--only` names, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="cases whose overrides have this in them; nothing is written")
    parser.add_argument("--wait-for", type=Path, help="a file while which exists no case is started")
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "disabled")
    lines, errors, facts = [], [], {}
    for case in CASES:
        if arguments.only and arguments.only not in " ".join(case):
            continue
        while arguments.wait_for and arguments.wait_for.exists():
            time.sleep(5)
        facts = measure(case)
        line, error = row(case, facts)
        print(line, flush=True)  # noqa: T201
        lines.append(line)
        errors.append(abs(error))
    within = sum(error <= ALLOWED for error in errors)
    summary = f"{within} of {len(errors)} within {ALLOWED:.0%}; the largest error is {max(errors):.1%}"
    print(summary)  # noqa: T201
    if not arguments.only:
        write(lines, summary, facts["device"])
    sys.exit(0 if within == len(errors) else 1)


def write(lines: list[str], summary: str, device: dict[str, Any]) -> None:
    """Write the table as Markdown."""
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    text = [
        "# Memory: estimate and peak",
        "",
        f"{summary}. `python -m benchmarks.memory`",
        "",
        f"{STEPS} steps on the sample rows, then an evaluation; each case in a process of its own. The estimate is "
        "made before the weights are loaded, the peak is the most that the process held (`VmHWM`). What the allocator "
        f"keeps was fitted to runs like the first {FITTED}; the others are predictions.",
        f"Machine: {device['name']}, {device['threads']} threads, {device['allocator']}, {platform.system()}; "
        f"{packages}.",
        "",
        "| run | estimate, MiB | peak, MiB | error |",
        "|---|---|---|---|",
        *lines,
    ]
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
