"""Folders that are whole or not there, and whose damage is found: any byte, any length, any file."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.training.checkpoints import newest_checkpoint
from lora_exp.training.integrity import MANIFEST, clear_leftovers, damage, seal, staged

FILES = {"adapter.safetensors": bytes(range(256)) * 9, "ref/adapter.safetensors": b"x", "empty": b""}
REPOSITORY = Path(__file__).parents[2]


def write(folder: Path) -> None:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def make(place: Path) -> Path:
    with staged(place) as part:
        write(part)
    return place


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    return make(tmp_path / "checkpoint-3")


def test_what_was_written_is_whole(sealed: Path) -> None:
    assert damage(sealed) is None
    assert [path.name for path in sealed.parent.iterdir()] == ["checkpoint-3"], "nothing is left beside it"


@given(name=st.sampled_from([*FILES, MANIFEST]), data=st.data())
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    folder = make(tmp_path_factory.mktemp("sealed") / "checkpoint-3")
    content = bytearray((folder / name).read_bytes())
    if not content:
        return
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    if name == MANIFEST and damage(folder) is None:
        # A bit of the manifest's own spelling (a space, say) says the same; every value is the one that was written.
        shutil.rmtree(folder / "ref")
    assert damage(folder) is not None


@given(name=st.sampled_from([name for name, content in FILES.items() if content]), data=st.data())
def test_any_cut_or_growth_is_found(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    folder = make(tmp_path_factory.mktemp("sealed") / "checkpoint-3")
    content = FILES[name]
    length = data.draw(st.integers(0, 2 * len(content)).filter(lambda length: length != len(content)))
    (folder / name).write_bytes((content * 2)[:length])
    found = damage(folder)
    assert found is not None
    assert f"{length:,} of {len(content):,} bytes" in found


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_found(sealed: Path, name: str) -> None:
    (sealed / name).unlink()
    assert damage(sealed) is not None
    assert Path(name).name in str(damage(sealed))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"empty": {}}}'])
def test_a_manifest_that_says_nothing_vouches_for_nothing(sealed: Path, text: str) -> None:
    (sealed / MANIFEST).write_text(text)
    assert damage(sealed) is not None


def test_the_newest_whole_one_is_found_and_every_newer_one_told(tmp_path: Path) -> None:
    for step in (2, 10, 9, 30):
        make(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    (tmp_path / "checkpoint-30" / "empty").unlink()
    (tmp_path / "checkpoint-10" / MANIFEST).unlink()
    found = newest_checkpoint(tmp_path)
    assert found.checkpoint == tmp_path / "checkpoint-9"
    assert {path.name for path in found.damaged} == {"checkpoint-30", "checkpoint-10"}
    assert all("is damaged: " in line and line.endswith("checkpoint-9") for line in found.say())


def test_a_write_that_fails_leaves_what_was_there(sealed: Path) -> None:
    def fail(part: Path) -> None:
        part.mkdir()
        (part / "empty").write_bytes(b"new")
        raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"), staged(sealed) as part:
        fail(part)
    assert damage(sealed) is None
    assert [path.name for path in sealed.parent.iterdir()] == ["checkpoint-3"]


WRITE_WITHOUT_END = """
import sys
from pathlib import Path
from tests.unit.test_integrity import make
while True:
    make(Path(sys.argv[1]))
"""


def test_a_kill_at_any_moment_leaves_a_whole_one(sealed: Path) -> None:
    for moment in range(12):
        with subprocess.Popen([sys.executable, "-c", WRITE_WITHOUT_END, str(sealed)], cwd=REPOSITORY) as writer:
            began, seen = time.monotonic(), sealed.stat().st_ino
            while sealed.exists() and sealed.stat().st_ino == seen and time.monotonic() - began < 20:
                time.sleep(0.001)  # until it writes
            time.sleep(moment * 0.0007)
            writer.send_signal(signal.SIGKILL)
        clear_leftovers(sealed.parent)
        assert damage(sealed) is None
        assert [path.name for path in sealed.parent.iterdir()] == ["checkpoint-3"]


def test_a_folder_can_be_sealed_again(sealed: Path) -> None:
    (sealed / "empty").write_bytes(b"changed on purpose")
    assert damage(sealed) is not None
    seal(sealed)
    assert damage(sealed) is None
