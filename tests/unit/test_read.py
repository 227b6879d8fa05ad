"""A file is the same, with the same problems, however it is read: in blocks, by several processes, from the cache."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import _ExecutorManagerThread
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.config import DataConfig
from lora_exp.data import read as room
from lora_exp.data.cache import NO_CACHE, Cache
from lora_exp.data.files import Unreadable
from lora_exp.data.jsonl import SHOWN
from lora_exp.data.kinds import COMPLETION, PREFERENCE
from lora_exp.data.load import load_splits
from lora_exp.data.read import ReadFile, read_file, read_files
from lora_exp.data.workers import workers
from lora_exp.errors import Problem, UserError

Make = Callable[..., dict[str, Any]]
Write = Callable[..., Path]
GOOD = b'{"prompt": "Where is it?", "chosen": "On its way.", "rejected": "No idea."}'


def expected(line: bytes) -> bool | None:
    """Return whether a line is a preference row, by the standard library alone; None of a blank one."""

    def constant(name: str) -> None:
        raise ValueError(name)

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    if not line.strip():
        return None
    try:
        row = json.loads(line.decode(), parse_constant=constant, object_pairs_hook=object_of)
        texts = [row[name] for name in ("prompt", "chosen", "rejected")]
        return all(isinstance(text, str) and text.strip() and text.encode() for text in texts)
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


junk = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        [b"\n", b"\r\n", b"\0", b'"', b"\\", b"\\ud800", b"NaN", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"}\n{"]
    ),
)


@settings(max_examples=150)
@given(data=st.data(), block_bytes=st.integers(1, 300))
def test_random_bytes_in_a_good_file_are_reported_with_their_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, block_bytes: int
) -> None:
    whole = bytearray(b"\n".join([GOOD] * 12) + b"\n")
    # The first line stays good: what begins like another kind of file is told as such.
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(len(GOOD) + 1, len(whole)))
        whole[place:place] = data.draw(junk)
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_bytes(whole)
    found = read_file(path, PREFERENCE, NO_CACHE, block_bytes, cores=1)
    lines = [expected(line) for line in bytes(whole).split(b"\n")]
    assert [problem.where for problem in found.problems] == [
        f"{path}:{number}" for number, good in enumerate(lines, start=1) if good is False
    ]
    assert list(found.marks.numbers) == [number for number, good in enumerate(lines, start=1) if good]
    assert len(found.rows) == sum(good is True for good in lines)


@settings(max_examples=60)
@given(content=st.binary(max_size=300), block_bytes=st.integers(1, 50))
def test_no_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes, block_bytes: int) -> None:
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"):
        path = tmp_path_factory.getbasetemp() / f"random{suffix}"
        path.write_bytes(content)
        found = read_file(path, PREFERENCE, NO_CACHE, block_bytes, cores=1)
        assert found.problems


def facts(file: ReadFile) -> Any:
    """Return everything that was found in a file."""
    return replace(file, rows=list(file.rows), from_cache=False), file.rows.digest  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file with rows of every sort: good, bad, blank, repeated, with addresses."""
    draw = random.Random(3)
    lines = []
    for number in range(3000):
        asked = draw.choice(["", "", "", "me@here.net ", "+49 30 1234567 "]) + f"p{draw.randrange(2000)} ß"
        row = {"prompt": asked, "chosen": f"c{number % 5}", "rejected": f"c{draw.randrange(5)}"}
        line = json.dumps(row, ensure_ascii=draw.random() < 0.5)
        bad = draw.random()
        if bad < 0.02:
            line = draw.choice(["{", "[]", "\0", '{"prompt": 3}', "", '{"prompt": NaN}', line + " x"])
        lines.append(line + draw.choice(["\n", "\r\n"]))
    path = tmp_path_factory.mktemp("mixed") / "rows.jsonl"
    path.write_text("".join(lines), encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("block_bytes", [1, 100, 5_000, 10**6])
def test_blocks_of_any_size_give_the_same(mixed: Path, block_bytes: int) -> None:
    whole = read_file(mixed, PREFERENCE, NO_CACHE, 10**9, cores=1)
    assert whole.bad > SHOWN
    assert {"emails", "phones", "equal_answers", "crlf"} <= set(whole.seen.found)
    assert facts(read_file(mixed, PREFERENCE, NO_CACHE, block_bytes, cores=1)) == facts(whole)


def test_other_processes_give_the_same(mixed: Path) -> None:
    one = read_file(mixed, PREFERENCE, NO_CACHE, 2_000, cores=1)
    assert facts(read_file(mixed, PREFERENCE, NO_CACHE, 2_000, cores=3)) == facts(one)


def test_another_process_that_is_killed_is_told(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = ProcessPoolExecutor.submit
    killed = []

    def submit_and_kill(pool: Any, *arguments: Any) -> Any:
        future = submit(pool, *arguments)
        if not killed:
            killed.extend(pool._processes.values())
            for process in killed:
                process.kill()
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit_and_kill)
    problems = read_file(mixed, PREFERENCE, NO_CACHE, 2_000, cores=2).problems
    assert killed
    assert problems[-1].where == str(mixed)
    assert "the system has ended a process" in problems[-1].what


def test_a_process_that_starts_while_others_are_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: between the pool's ending of its processes and its waiting for them."""
    # Since CPython 3.12 there are two of that name, of which the second one waits.
    *_, name = (name for name in vars(_ExecutorManagerThread) if name.strip("_") == "join_executor_internals")
    join = getattr(_ExecutorManagerThread, name)
    late = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))

    def join_with_late(manager: Any, *arguments: Any, **keywords: Any) -> None:
        manager.processes[late.pid] = late
        join(manager, *arguments, **keywords)

    def work_with_killed() -> None:
        with workers(1) as pool:
            late.start()
            future = pool.submit(time.sleep, 600)
            next(iter(pool._processes.values())).kill()
            future.result()

    monkeypatch.setattr(_ExecutorManagerThread, name, join_with_late)
    with pytest.raises(Unreadable, match="the system has ended a process"):
        work_with_killed()
    assert not late.is_alive()


# Ids.


def test_an_id_that_stands_twice_is_an_error_that_names_both_rows(
    tmp_path: Path, write_jsonl: Write, record: Make
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [record(id="a"), "", record(id="b"), record(id="a")])
    val = write_jsonl(tmp_path / "val.jsonl", [record(id="c"), record(id="b"), record(id=" c ")])
    with pytest.raises(UserError) as caught:
        read_files([train, val], COMPLETION, NO_CACHE)
    assert caught.value.title == "3 lines of the data cannot be used"
    assert caught.value.problems == [
        Problem(f"{train}:4", "has the same id as line 1"),
        Problem(f"{val}:2", f"has the same id as {train}:3"),
        Problem(f"{val}:3", "has the same id as line 1"),
    ]


def test_ids_count_only_where_the_format_has_them(tmp_path: Path, write_jsonl: Write, preference: Make) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [preference(id=1), preference(id=1)])
    (file,) = read_files([path], PREFERENCE, NO_CACHE)
    assert len(file.rows) == 2


# The cache of checked rows.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Return a cache that keeps small files too, of which little is held in memory."""
    monkeypatch.setattr(room, "KEPT_FROM_BYTES", 0)
    monkeypatch.setattr(room, "SPILLED_FROM_BYTES", 1000)
    return Cache(tmp_path / "cache", 10**9)


def sound(tmp_path: Path, rows: int = 100) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"p{n} ü", "chosen": "c" * (n % 7 + 1), "rejected": "c"} for n in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_what_was_found_in_the_same_bytes_is_found_again(tmp_path: Path, cache: Cache) -> None:
    path = sound(tmp_path)
    first, second = (read_file(path, PREFERENCE, cache) for _ in range(2))
    assert (first.from_cache, second.from_cache) == (False, True)
    assert facts(first) == facts(second) == facts(read_file(path, PREFERENCE, NO_CACHE))
    assert second.rows[-1] == second.rows[99] == list(second.rows)[99]
    assert second.rows[3:5] == [second.rows[3], second.rows[4]]
    with pytest.raises(IndexError):
        second.rows[100]
    moved = path.rename(tmp_path / "moved.jsonl")
    assert read_file(moved, PREFERENCE, cache).from_cache
    moved.write_bytes(moved.read_bytes().replace(b"p3 ", b"p4 "))
    assert not read_file(moved, PREFERENCE, cache).from_cache


def test_a_file_with_problems_is_not_kept(tmp_path: Path, cache: Cache) -> None:
    path = sound(tmp_path)
    path.write_bytes(path.read_bytes() + b"{\n")
    first, second = (read_file(path, PREFERENCE, cache) for _ in range(2))
    assert not second.from_cache
    assert facts(first) == facts(second)


def test_the_rows_outlive_their_entry(tmp_path: Path, cache: Cache) -> None:
    """Another process may drop it at any time."""
    import shutil

    path = sound(tmp_path)
    kept, again = read_file(path, PREFERENCE, cache), read_file(path, PREFERENCE, cache)
    shutil.rmtree(cache.folder)
    assert list(kept.rows) == list(again.rows)


def test_another_kind_of_row_is_checked_anew(tmp_path: Path, cache: Cache) -> None:
    path = sound(tmp_path)
    read_file(path, PREFERENCE, cache)
    assert read_file(path, COMPLETION, cache).problems


def test_a_cache_that_cannot_be_written_costs_a_note_and_no_rows(tmp_path: Path, cache: Cache) -> None:
    path = sound(tmp_path)
    cache.folder.write_text("in the way", encoding="utf-8")
    assert facts(read_file(path, PREFERENCE, cache)) == facts(read_file(path, PREFERENCE, NO_CACHE))
    (failure,) = cache.failures
    assert str(cache.folder) in failure


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not kept"])
def test_rows_for_which_there_is_no_room_are_told(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """Here because files may have no more than 5,000 bytes; a full disk is told the same way."""
    path = sound(tmp_path, 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        file = read_file(path, PREFERENCE, cache if kept else NO_CACHE, 2_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (problem,) = file.problems
    assert (problem.where, problem.what) == (str(path), "its rows cannot be put aside: File too large")
    assert not kept or not any(cache.folder.iterdir())


def test_load_splits_reads_large_files_from_the_cache_of_the_config(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path))
    path = sound(tmp_path)
    config = DataConfig(train_file=str(path))
    assert load_splits(config, PREFERENCE) == load_splits(config, PREFERENCE)
    assert [entry.name.partition("-")[0] for entry in (tmp_path / "data").iterdir()] == ["rows"]
