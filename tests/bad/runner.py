"""Run the command in a fresh process that has its imports behind it: a fork of a server, a tenth of a second each."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEAVY = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True)
class Answer:
    """What the command said and did.

    Args:
        status: Its exit status.
        stdout: What it printed.
        stderr: What it complained of.
        heavy: Which libraries it loaded that an answer to bad input does without.
    """

    status: int
    stdout: str
    stderr: str
    heavy: tuple[str, ...]


def answer(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], scratch: Path) -> Answer:
    """Run `python -m lora_exp` with these arguments in a folder and return what came of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_exp.__main__", "lora_exp.run", "tests.bad.runner"])
    process = context.Process(target=_run, args=(list(arguments), cwd, dict(environment), scratch))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    texts = [(scratch / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr", "heavy")]
    return Answer(process.exitcode, texts[0], texts[1], tuple(texts[2].split()))


def _run(arguments: list[str], cwd: Path, environment: dict[str, str], scratch: Path) -> None:
    from lora_exp.__main__ import main

    os.chdir(cwd)
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (scratch / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["lora_exp", *arguments]
    (scratch / "heavy").write_text("")
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (scratch / "heavy").write_text(" ".join(name for name in HEAVY if name in sys.modules))
