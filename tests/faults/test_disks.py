"""Disks that are full or may not be written: said with the place, nothing half-written left, the checkpoints good."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lora_exp.training.checkpoints import newest_checkpoint
from tests.faults.harness import Ended, Moment, Running, Server, Tally, outcome, when_logged, when_there
from tests.faults.test_kills import COMMON, RUNS

SFT = [*COMMON, *RUNS["sft"]]
SMALL = 24 << 20


def many(*values: Any) -> Any:
    """Return a case that `make test` leaves to `make test-faults`."""
    return pytest.param(*values, marks=pytest.mark.faults)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a small disk in memory with some options."""
    places = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("this user may not mount a disk in memory")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, left: int) -> None:
    """Fill a disk but for some bytes, while the run may be writing to it too."""
    with (place / f"filler{len(list(place.iterdir()))}").open("wb", buffering=0) as file:
        size = 1
        while size > 0:
            free = os.statvfs(place)
            size = free.f_bavail * free.f_frsize - left
            with suppress(OSError):  # the run has taken of it since; what is left now is less
                file.write(bytes(max(size, 0)))


def filled(when: Moment, left: int) -> Moment:
    """Return a moment that never comes for a signal, and fills the disk when another comes."""

    def come(running: Running) -> bool:
        disk = running.folder.parent
        if not any(disk.glob("filler*")) and when(running):
            fill(disk, left)
        return False

    return come


def is_told(ended: Ended, what: str) -> None:
    assert ended.status == 2, ended.said
    assert what in ended.said
    assert "the disk is full" in ended.said
    assert "resume=" in ended.said
    assert "Traceback" not in ended.said, ended.said
    assert "Logging error" not in ended.said, ended.said


@pytest.mark.parametrize(
    ("when", "left", "what", "overrides"),
    [
        # A checkpoint takes about 700 KiB here, an adapter 160 KiB; thirty lines take more than a page of the disk.
        (when_there("checkpoints/checkpoint-3"), 300 << 10, "the checkpoint could not be written", []),
        many(when_logged(2), 100 << 10, "the checkpoint could not be written", []),
        many(when_logged(2), 0, "could not be written", ["trainer.max_steps=30", "trainer.save_strategy=no"]),
        many(when_logged(13), 100 << 10, "the adapter could not be written", ["trainer.save_strategy=no"]),
    ],
    ids=["a later checkpoint", "the first checkpoint", "a line", "the adapter"],
)
def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(
    server: Server,
    mounted: Callable[[str], Path],
    tally: Tally,
    tmp_path: Path,
    when: Moment,
    left: int,
    what: str,
    overrides: list[str],
) -> None:
    disk = mounted(f"size={SMALL}")
    folder, harm = disk / "run", {"SIGKILL": filled(when, left)}
    command = [*SFT, *overrides]
    ended = server.run(*command, f"output_dir={folder}", cwd=tmp_path, folder=folder, harm=harm)
    tally.inject("disk full")
    is_told(ended, what)
    names = [path.name for path in folder.rglob("*")]
    assert not [name for name in names if name.startswith((".part", ".reserve")) or name.endswith(".unfinished")]
    assert not newest_checkpoint(folder / "checkpoints").damaged
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    assert (folder / "metrics.jsonl").read_bytes().endswith(b"\n")
    for filler in disk.glob("filler*"):
        filler.unlink()
    assert server.run(f"resume={folder}", cwd=tmp_path).status == 0
    alone = server.run(*command, "output_dir=alone", cwd=tmp_path)
    assert alone.status == 0
    assert outcome(folder) == outcome(tmp_path / "alone")
    tally.survive("disk full")


@pytest.mark.faults
def test_a_file_that_may_not_grow_is_told(server: Server, tally: Tally, tmp_path: Path) -> None:
    """A quota for each file: the first one that is over it is the embedded model's, in a folder for the moment."""
    ended = server.run(*SFT, "output_dir=run", cwd=tmp_path, limits={"RLIMIT_FSIZE": 250_000})
    tally.inject("file larger than allowed")
    assert ended.status == 2, ended.said
    assert "a file could not be written" in ended.said
    assert "larger than the system allows" in ended.said
    assert "Traceback" not in ended.said
    tally.survive("file larger than allowed")


@pytest.mark.parametrize("arguments", [["output_dir={}/run"], ["-m", "hydra.sweep.dir={}/grid", "lora.r=4,8"]])
def test_a_folder_that_cannot_be_written_is_told_before_anything(
    server: Server, mounted: Callable[[str], Path], tally: Tally, tmp_path: Path, arguments: list[str]
) -> None:
    disk = mounted("size=1M,ro")
    ended = server.run(*[each.format(disk) for each in arguments], *SFT, cwd=tmp_path)
    tally.inject("folder that cannot be written")
    assert ended.status == 2, ended.said
    assert "cannot be written" in ended.said
    assert "recipe" not in ended.said, "nothing was begun"
    assert "Traceback" not in ended.said
    tally.survive("folder that cannot be written")


def test_a_disk_that_is_full_from_the_start_is_told_before_anything(
    server: Server, mounted: Callable[[str], Path], tally: Tally, tmp_path: Path
) -> None:
    disk = mounted(f"size={SMALL}")
    fill(disk, 100)
    ended = server.run(*SFT, f"output_dir={disk}/run", cwd=tmp_path)
    tally.inject("disk full from the start")
    assert ended.status == 2, ended.said
    assert "is full" in ended.said
    assert not (disk / "run").exists()
    tally.survive("disk full from the start")
