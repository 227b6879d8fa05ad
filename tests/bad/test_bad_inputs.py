"""Every bad input is answered at once, with place, reason and status 2; nothing is learned, written or lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad.inputs import Bad, table
from tests.bad.runner import answer

TABLE = list(table())
RECORD_OF_A_FAILURE = {"run.json", "config.yaml", "lora_exp.log", ".lock"}
"""What a run folder holds where its rows were refused: what was asked, and why it failed. It can be used again."""


def test_the_table_is_not_tiny() -> None:
    assert len(TABLE) >= 120
    assert len({bad.name for bad in TABLE}) == len(TABLE)


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_bad_input_is_answered_and_nothing_is_lost(bad: Bad, tmp_path: Path) -> None:
    folder, scratch = tmp_path / "work", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    for name, content in bad.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    environment = {"WANDB_MODE": "offline", "LORA_EXP_CACHE": str(tmp_path / "cache"), **bad.environment}

    found = answer(bad.arguments, folder, environment, scratch)

    assert found.status == 2, found.stderr
    assert bad.says in found.stderr
    assert "Traceback" not in found.stdout + found.stderr
    assert not found.heavy, "a library was loaded before the answer"
    for name, content in bad.files.items():
        assert (folder / name).read_bytes() == content, f"{name} was changed"
    written = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} - {
        Path(name) for name in bad.files
    }
    results = {path for path in written if path.name not in RECORD_OF_A_FAILURE and path.parent.name != ".hydra"}
    assert not results, "something was written"
