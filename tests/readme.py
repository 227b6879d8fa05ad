"""`python -m tests.readme 10`: run the first commands of the README that need no fetched model, as they stand there."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path

from tests.smoke.test_commands import QUICK, ROOT, own_rows, run


def run_first(number: int, folder: Path) -> None:
    """Run commands in a folder, one after the other; where they name a run, it is the first one's.

    Raises:
        SystemExit: If one of them fails, or warns.
    """
    own_rows(folder)
    for command in QUICK[:number]:
        first = next((path.parent for path in sorted(folder.glob("outputs/*/*/run.json"))), folder)
        command = re.sub(r"outputs/<[^>]*>", str(first.relative_to(folder)), command)
        started = time.perf_counter()
        done = run(command, folder, PYTHONPATH=str(ROOT))
        print(f"{time.perf_counter() - started:6.1f} s  {command}", flush=True)  # noqa: T201
        if done.returncode or "Traceback" in done.stderr or "Warning" in done.stderr:
            sys.exit(f"{done.stdout}{done.stderr}\nstatus {done.returncode}: {command}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="lora_exp-readme-") as scratch:
        run_first(int(sys.argv[1]), Path(scratch))
