"""`python -m benchmarks.check_rows`: how long a million preference rows take to be checked, and in how much memory."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).with_name("CHECK_ROWS.md")
LIMITS = {"seconds": 60.0, "memory": 1000.0}
"""What a million rows may take: seconds, and MB of all processes together."""

SENTENCES = 20_000
MB = 1e6


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Write preference rows of about 1 kB, of made-up words; a few have accents."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    syllables = [a + b for a in "bdfgklmnprstvw" for b in ("a", "e", "i", "o", "u", "é")[: 5 + (a == "m")]]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20_000)]
    sentences = [" ".join(draw.choices(words, k=draw.randint(5, 14))).capitalize() + "." for _ in range(SENTENCES)]

    def text(shortest: int, longest: int) -> str:
        return " ".join(draw.choices(sentences, k=draw.randint(shortest, longest)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            row = {"prompt": text(2, 6), "chosen": text(3, 9), "rejected": text(3, 9)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


CHECK = """
import sys
from lora_exp.config import DataConfig
from lora_exp.data.kinds import PREFERENCE
from lora_exp.data.load import load_splits
if __name__ == "__main__":
    split = load_splits(DataConfig(train_file=sys.argv[1], cache_size=int(sys.argv[2])), PREFERENCE)["train"]
    print(len(split.rows))
    assert "torch" not in sys.modules
"""


def measure(path: Path, folder: Path, cache_size: int) -> tuple[float, float, float, int]:
    """Check a file in a process of its own.

    Returns:
        Seconds from its start to its end; seconds that processors worked on it; the most MB that it and its children
        had resident together, by their share of common pages (PSS); the rows.
    """
    script = folder / "check.py"
    script.write_text(CHECK, encoding="utf-8")
    environment = {**os.environ, "LORA_EXP_CACHE": str(folder / "cache"), "PYTHONPATH": str(Path.cwd())}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(  # noqa: S603 - this file's own script
        [sys.executable, str(script), str(path), str(cache_size)], env=environment, stdout=subprocess.PIPE, text=True
    )
    peaks: list[float] = [0.0]
    watcher = threading.Thread(target=_watch, args=(process, peaks))
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode:
        raise SystemExit(process.returncode)
    return seconds, worked, peaks[0], int(output)


def _watch(process: subprocess.Popen[str], peaks: list[float]) -> None:
    while process.poll() is None:
        peaks[0] = max(peaks[0], sum(_resident(process.pid)) / MB)
        time.sleep(0.1)


def _resident(pid: int) -> Iterator[int]:
    try:
        parent = psutil.Process(pid)
        for each in [parent, *parent.children(recursive=True)]:
            yield each.memory_full_info().pss
    except psutil.NoSuchProcess:
        return


def compressed(path: Path, suffix: str, copy: Callable[[Path, Path], None]) -> Path:
    """Write a file again in another form beside it."""
    other = path.with_name(path.name.removesuffix(".jsonl") + suffix)
    copy(path, other)
    return other


def _gzip(path: Path, other: Path) -> None:
    import gzip
    import shutil

    with path.open("rb") as source, gzip.open(other, "wb", compresslevel=1) as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _zstd(path: Path, other: Path) -> None:
    import pyarrow

    with path.open("rb") as source, pyarrow.output_stream(str(other), compression="zstd") as target:
        while data := source.read(1 << 20):
            target.write(data)


def _parquet(path: Path, other: Path) -> None:
    from pyarrow import json as arrow_json
    from pyarrow import parquet

    reader = arrow_json.open_json(path)
    with parquet.ParquetWriter(other, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)


FORMS: dict[str, Callable[[Path, Path], None]] = {".jsonl.gz": _gzip, ".jsonl.zst": _zstd, ".parquet": _parquet}


def main() -> None:
    """Measure, print and, if asked, write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_rows", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the files go, 3 GB for a million rows; else temporary")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    console, load = Console(), os.getloadavg()[0]
    table = Table(
        "file", "MB", "seconds", "MB/s", "CPU seconds", "peak MB", title=f"{arguments.rows:,} preference rows checked"
    )
    with tempfile.TemporaryDirectory(prefix="check_rows-", dir=arguments.folder) as name:
        folder = Path(name)
        plain = folder / "rows.jsonl"
        write_rows(plain, arguments.rows)
        megabytes = plain.stat().st_size / MB

        def add(label: str, path: Path, cache_size: int = 0) -> tuple[float, float]:
            seconds, worked, peak, rows = measure(path, folder, cache_size)
            assert rows == arguments.rows
            size = path.stat().st_size / MB
            table.add_row(
                label, f"{size:,.0f}", f"{seconds:.1f}", f"{megabytes / seconds:.0f}", f"{worked:.1f}", f"{peak:,.0f}"
            )
            console.print(f"{label}: {seconds:.1f} s, {worked:.1f} s of CPU time, {peak:,.0f} MB")
            return seconds, peak

        found = add(".jsonl", plain)
        add(".jsonl, kept in the cache", plain, 10**11)
        add(".jsonl, from the cache", plain, 10**11)
        for suffix, copy in FORMS.items():
            add(suffix, compressed(plain, suffix, copy))
    console.print(table)
    if arguments.write:
        write(table, load)
    if arguments.rows <= 1_000_000 and (found[0] > LIMITS["seconds"] or found[1] > LIMITS["memory"]):
        raise SystemExit(f"more than {LIMITS['seconds']:.0f} s or {LIMITS['memory']:,.0f} MB")


def write(table: Table, load: float) -> None:
    """Write the table as Markdown."""
    import platform

    from lora_exp.process.threads import usable_cores

    cells = [list(column.cells) for column in table.columns]
    lines = [
        "# Rows checked",
        "",
        f"{table.title}, from the start of a process to its end; MB/s of plain text; memory of all its processes.",
        f"{usable_cores()} cores, {platform.system()}, Python {platform.python_version()}. "
        f"Other work on the machine (load {load:.1f} before) makes the seconds longer, not those of the CPU. "
        "`python -m benchmarks.check_rows --write`",
        "",
        "| " + " | ".join(str(column.header) for column in table.columns) + " |",
        "|---" + "|---:" * (len(table.columns) - 1) + "|",
        *("| " + " | ".join(map(str, row)) + " |" for row in zip(*cells, strict=True)),
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
