"""The Pythons are the same wherever they are named, and any other is refused before anything is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAMED = re.findall(r":: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_pythons_are_the_same_everywhere() -> None:
    after = f"3.{int(NAMED[-1].partition('.')[2]) + 1}"
    assert PROJECT["project"]["requires-python"] == f">={NAMED[0]},<{after}"
    assert PROJECT["tool"]["mypy"]["python_version"] == NAMED[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{NAMED[0].replace('.', '')}"
    assert re.findall(r"^PYTHONS \?= (.*)", MAKEFILE, re.MULTILINE) == [" ".join(f"python{each}" for each in NAMED)]
    assert f"With Python {', '.join(NAMED[:-1])} or {NAMED[-1]} and make" in README


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("version", "refused"),
    [((2, 7, 18), True), ((3, 10, 13), True), ((3, 11, 0), False), ((3, 13, 7), False), ((3, 14, 0), True)],
)
def test_make_refuses_another_python_in_one_line(tmp_path: Path, version: tuple[int, ...], refused: bool) -> None:
    python = tmp_path / "python"
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[2]) if sys.argv[1] == '-c' else sys.exit(3)"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    python.chmod(0o755)
    environment = tmp_path / "venv"
    command = ["make", "-C", str(ROOT), "--no-print-directory", "demo", f"PYTHON={python}", f"VENV={environment}"]
    fresh = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, env=fresh, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert not environment.exists()
    if refused:
        first, ending = done.stderr.splitlines()
        shown = ".".join(map(str, version[:2]))
        named = f"Python {NAMED[0]} to {NAMED[-1]}"
        assert first == f"error: lora_exp runs on {named}, this is {shown}; name one: make PYTHON=python3.12 demo"
        assert ending.startswith("make: ***")
    else:
        assert "error: lora_exp" not in done.stderr
        assert "Error 3" in done.stderr, "it got to `-m venv`, which this interpreter does not do"
