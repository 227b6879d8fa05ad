"""The reference store: what is read is what was put, whoever else writes, dies or damages the file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lora_exp.engine import digests, store_file
from lora_exp.engine.store import ReferenceStore, default_path, row_key
from lora_exp.errors import UserError
from lora_exp.store import human_size, main

REPOSITORY = Path(__file__).parents[2]
PLENTY = 10**9
ME = "a" * 32
OTHER = "b" * 32
ABOUT = {"model": "an-owner/A-Model", "quant": "4bit nf4", "dtype": "bfloat16", "adapter": "none", "engine": "packed"}

token_ids = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20)


def rows(number: int, size: int = 100, first: int = 0) -> dict[bytes, bytes]:
    """Return values that tell which key they belong to."""
    return {key(index): value(index, size) for index in range(first, first + number)}


def key(index: int) -> bytes:
    return row_key([index], [1])


def value(index: int, size: int = 100) -> bytes:
    return hashlib.shake_128(str(index).encode()).digest(size)


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a path in a folder that is not there yet; in memory if possible, since a store syncs whenever it closes."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="lora_exp-store-", dir=memory) as folder:
        yield Path(folder) / "cache" / "reference.sqlite3"


@pytest.fixture
def path() -> Iterator[Path]:
    with scratch() as path:
        yield path


def right(found: dict[bytes, bytes], values: dict[bytes, bytes]) -> bool:
    """Tell whether every value that was found is the one that was put."""
    return found.items() <= values.items()


def filled(path: Path, values: dict[bytes, bytes], identity: str = ME) -> Path:
    with ReferenceStore(path, PLENTY) as store:
        store.put(identity, ABOUT, values)
    return path


def read(path: Path, keys: list[bytes], identity: str = ME) -> dict[bytes, bytes]:
    with ReferenceStore(path, PLENTY) as store:
        assert store.note is None
        return store.get(identity, keys)


def sql(path: Path, statement: str, *values: object) -> list[tuple[object, ...]]:
    """Do something to the file that the store does not know of."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(statement, values).fetchall()


# Values.


@given(st.dictionaries(st.binary(max_size=20), st.binary(max_size=300), max_size=20))
@example({b"": b"", b"\0": b"\0"})
def test_what_is_read_is_what_was_put(values: dict[bytes, bytes]) -> None:
    with scratch() as path:
        with ReferenceStore(path, PLENTY) as store:
            store.put(ME, ABOUT, values)
            assert store.get(ME, list(values)) == values
            assert store.check() == []
        assert read(path, list(values)) == values


def test_more_values_than_a_statement_has_variables_come_back(path: Path) -> None:
    values = rows(40_000, size=4)
    filled(path, values)
    assert read(path, list(values)) == values


def test_a_key_that_was_never_put_is_absent(path: Path) -> None:
    filled(path, rows(3))
    assert read(path, [key(1), key(7), key(1)]) == rows(1, first=1)
    assert read(path, []) == {}


def test_identities_do_not_mix(path: Path) -> None:
    filled(path, {key(0): b"mine"})
    filled(path, {key(0): b"other", key(1): b"only the other's"}, OTHER)
    assert read(path, [key(0), key(1)]) == {key(0): b"mine"}
    assert read(path, [key(0), key(1)], OTHER) == {key(0): b"other", key(1): b"only the other's"}
    assert read(path, [key(0)], ME[:-1]) == {}


def test_putting_again_changes_no_value_and_no_count(path: Path) -> None:
    with ReferenceStore(path, PLENTY) as store:
        store.put(ME, ABOUT, rows(10))
        store.put(ME, {"model": "a later description"}, rows(20))
        (model,) = store.summary()
        assert (model.identity, model.description, model.rows, model.bytes) == (ME, ABOUT, 20, 2000)
        assert store.get(ME, list(rows(20))) == rows(20)
        assert store.check() == []


def test_an_error_amid_a_put_leaves_nothing_of_it(path: Path) -> None:
    filled(path, rows(2))
    with ReferenceStore(path, PLENTY) as store:
        with pytest.raises(TypeError):
            store.put(OTHER, ABOUT, rows(5) | {key(9): None})  # type: ignore[arg-type]
        assert [(model.identity, model.rows) for model in store.summary()] == [(ME, 2)]
        assert store.check() == []


@given(token_ids, token_ids, token_ids, token_ids)
def test_a_row_key_tells_any_two_rows_apart(a: list[int], b: list[int], c: list[int], d: list[int]) -> None:
    assert len(row_key(a, b)) == 16
    assert (row_key(a, b) == row_key(c, d)) == ((a, b) == (c, d))


@given(token_ids, st.data())
def test_a_row_key_changes_when_the_boundary_moves(ids: list[int], data: st.DataObject) -> None:
    first, second = (data.draw(st.integers(0, len(ids))) for _ in range(2))
    assume(first != second)
    assert row_key(ids[:first], ids[first:]) != row_key(ids[:second], ids[second:])


def test_row_keys_are_the_same_on_every_platform() -> None:
    plain = b"".join(number.to_bytes(8, "little", signed=True) for number in (2, 1, 151_643, -100))
    assert row_key([1, 151_643], [-100]) == hashlib.blake2b(plain, digest_size=16).digest()


# The size.


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=30))
def test_what_was_not_used_for_longest_goes_first(actions: list[tuple[bool, int]]) -> None:
    """Against a plain model: a put beyond 60 bytes drops the oldest use until at most 54 are left."""
    expected: OrderedDict[int, None] = OrderedDict()
    with scratch() as path, ReferenceStore(path, max_size=60) as store:
        for is_put, index in actions:
            if is_put:
                store.put(ME, ABOUT, {key(index): value(index, 10)})
                expected[index] = None
            else:
                assert set(store.get(ME, [key(index)])) == ({key(index)} if index in expected else set())
            if index in expected:
                expected.move_to_end(index)
            if len(expected) * 10 > 60:
                for _ in range(len(expected) - 5):
                    expected.popitem(last=False)
        everything = {key(index): value(index, 10) for index in range(10)}
        assert store.get(ME, list(everything)) == {key(index): everything[key(index)] for index in expected}
        assert store.check() == []


def test_what_is_in_use_stays_as_long_as_something_else_can_go(path: Path) -> None:
    filled(path, rows(6))
    with ReferenceStore(path, max_size=1000) as store:
        store.get(ME, [key(0)])
        store.put(OTHER, ABOUT, rows(9))
        # All old rows but the one in use are gone; what is left is more than 90 %, but not too much.
        assert store.get(ME, list(rows(6))) == rows(1)
        assert store.get(OTHER, list(rows(9))) == rows(9)


def test_a_clock_that_is_set_back_mixes_up_no_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, rows(5))
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    with ReferenceStore(path, max_size=600) as store:
        store.put(ME, ABOUT, rows(2, first=5))
        assert store.get(ME, list(rows(7))) == rows(5, first=2)


def test_a_model_of_which_nothing_is_left_is_forgotten(path: Path) -> None:
    filled(path, rows(5))
    with ReferenceStore(path, max_size=500) as store:
        store.put(OTHER, ABOUT, rows(5))
        assert [model.identity for model in store.summary()] == [OTHER]


def test_one_put_that_is_larger_than_the_store_may_be_is_cut_too(path: Path) -> None:
    with ReferenceStore(path, max_size=1000) as store:
        store.put(ME, ABOUT, rows(100))
        assert sum(model.bytes for model in store.summary()) <= 900
        assert store.check() == []


def test_the_file_stays_as_small_as_its_values_and_shrinks_when_they_go(path: Path) -> None:
    def size() -> int:
        return sum(each.stat().st_size for each in path.parent.iterdir())

    filled(path, rows(6000, size=500))
    full = size()
    limit = 500_000
    with ReferenceStore(path, limit) as store:
        for first in range(6000, 9000, 500):
            store.put(ME, ABOUT, rows(500, size=500, first=first))
            assert sum(model.bytes for model in store.summary()) <= limit
        assert size() < 2 * limit < full / 3
        store.clear(None)
        assert size() < 200_000
    assert size() < 200_000


# Other processes.


def test_reading_waits_for_no_writer_and_the_use_is_marked_later(path: Path) -> None:
    filled(path, rows(4))
    with closing(sqlite3.connect(path, isolation_level=None)) as writer, ReferenceStore(path, max_size=400) as store:
        writer.execute("BEGIN IMMEDIATE")
        started = time.perf_counter()
        assert store.get(ME, [key(0)]) == rows(1)
        assert time.perf_counter() - started < 5
        writer.execute("ROLLBACK")
        store.put(ME, ABOUT, rows(1, first=4))
        assert store.get(ME, list(rows(5))).keys() == {key(0), key(3), key(4)}


def test_a_lock_that_stays_is_a_user_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_file, "WAIT_S", 0.1)
    filled(path, rows(1))
    with closing(sqlite3.connect(path, isolation_level=None)) as writer, ReferenceStore(path, PLENTY) as store:
        writer.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match=re.escape(f"{path} has been locked by another process")) as caught:
            store.put(ME, ABOUT, rows(2))
    assert "store.path=" in caught.value.problems[0].mend
    assert read(path, list(rows(2))) == rows(1)


WORKER = """
import hashlib, sys
from pathlib import Path
from lora_exp.engine.store import ReferenceStore, row_key
def rows(first, last):
    return {row_key([n], [1]): hashlib.shake_128(str(n).encode()).digest(100) for n in range(first, last)}
path, number, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(rounds):
    with ReferenceStore(path, 10**9) as store:
        for first in range(0, 300, 50):
            mine = rows(1000 * number + first, 1000 * number + first + 50)
            store.put(f"{number}" * 32, {"model": "own"}, mine)
            store.put("s" * 32, {"model": "shared"}, rows(first, first + 50))
            assert store.get(f"{number}" * 32, list(mine)) == mine
            assert store.get("s" * 32, list(rows(first, first + 50))) == rows(first, first + 50)
            print(first, flush=True)
"""


@contextmanager
def worker(path: Path, number: int, rounds: int) -> Iterator[subprocess.Popen[str]]:
    """Start a process that puts and gets as soon as it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), str(number), str(rounds)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("before", [None, b"no database at all"], ids=["no store yet", "a damaged one"])
def test_processes_that_write_at_once_lose_nothing(path: Path, before: bytes | None) -> None:
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)
    with worker(path, 1, 2) as one, worker(path, 2, 2) as two, worker(path, 3, 2) as three, worker(path, 4, 2) as four:
        processes = [one, two, three, four]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            start(process)
        assert [process.wait(timeout=60) for process in processes] == [0] * 4
    for number in range(1, 5):
        assert read(path, list(rows(300, first=1000 * number)), str(number) * 32) == rows(300, first=1000 * number)
    assert read(path, list(rows(300)), "s" * 32) == rows(300)
    with ReferenceStore(path, PLENTY) as store:
        assert store.check() == []
    aside = [each.read_bytes() for each in path.parent.glob("*.damaged-*")]
    assert aside == ([] if before is None else [before])


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.03, 0.1])
def test_a_killed_process_leaves_a_sound_store(path: Path, delay: float) -> None:
    with worker(path, 1, 1000) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        start(process)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        told = [int(line) for line in process.stdout.read().splitlines()]
    with ReferenceStore(path, PLENTY) as store:
        assert store.note is None
        assert store.check() == []
        found = store.get("s" * 32, list(rows(300)))
        assert right(found, rows(300))
        assert len(found) % 50 == 0, "a put is there whole or not at all"
        assert len(found) >= max(told, default=-50) + 50, "what was committed before the kill stays"
        store.put("s" * 32, ABOUT, rows(300))
        assert store.get("s" * 32, list(rows(300))) == rows(300)


def test_who_still_holds_a_store_that_was_moved_aside_does_the_new_one_no_harm(path: Path) -> None:
    filled(path, rows(1))
    with ReferenceStore(path, PLENTY) as holder:
        holder.put(ME, ABOUT, rows(2))
        path.rename(path.with_name("elsewhere"))
        Path(f"{path}-wal").rename(path.with_name("elsewhere-wal"))
        with ReferenceStore(path, PLENTY) as store:
            store.put(ME, ABOUT, rows(5))
            assert holder.get(ME, list(rows(5))) == rows(2)
            holder.put(ME, ABOUT, rows(3))
            holder.close()
            assert store.get(ME, list(rows(5))) == rows(5)
        assert read(path, list(rows(5))) == rows(5)


# Damage.


def test_a_damaged_value_is_found_by_check_and_absent_afterwards(path: Path) -> None:
    filled(path, rows(5))
    sql(path, "UPDATE contents SET value = zeroblob(100) WHERE id = (SELECT id FROM entries WHERE key = ?)", key(2))
    with ReferenceStore(path, PLENTY) as store:
        (problem,) = store.check()
        assert key(2).hex() in problem
        assert store.check() == [problem], "check changes nothing"
        assert store.get(ME, list(rows(5))).keys() == rows(5).keys() - {key(2)}
        assert store.check() == []
        assert store.summary()[0].rows == 4
        store.put(ME, ABOUT, rows(5))
        assert store.get(ME, list(rows(5))) == rows(5)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE contents SET value = 'a text' WHERE id = 2",
        "UPDATE contents SET checksum = 3 WHERE id = 2",
        "DELETE FROM contents WHERE id = 2",
        "UPDATE entries SET key = x'00' WHERE id = 2",
        "UPDATE models SET rows = 4",
        "UPDATE models SET bytes = 4",
    ],
)
def test_whatever_is_wrong_in_the_tables_is_found_and_never_read(path: Path, change: str) -> None:
    filled(path, rows(5))
    sql(path, change)
    with ReferenceStore(path, PLENTY) as store:
        assert len(store.check()) == 1
        assert right(store.get(ME, [*rows(5), b"\0"]), rows(5))


@pytest.mark.parametrize("content", [b"no database\n", b"\0" * 8192, b"SQLite format 3\0" + b"\xff" * 9000])
def test_a_file_that_is_no_database_is_moved_aside_whole_and_noted(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    for number in (1, 2):
        path.write_bytes(content)
        with ReferenceStore(path, PLENTY) as store:
            aside = path.with_name(f"{path.name}.damaged-{number}")
            assert store.note is not None
            assert str(path) in store.note
            assert aside.name in store.note
            assert aside.read_bytes() == content
            store.put(ME, ABOUT, rows(2))
        assert read(path, list(rows(2))) == rows(2)


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_an_empty_file_or_a_forgotten_log_is_no_damage(path: Path, there: bool) -> None:
    filled(path, rows(3))
    with ReferenceStore(path, PLENTY) as store:
        store.put(ME, ABOUT, rows(5))
        log = shutil.copy(f"{path}-wal", f"{path}.copy")
    path.unlink()
    if there:
        path.touch()
    Path(log).rename(f"{path}-wal")
    with ReferenceStore(path, PLENTY) as store:
        assert store.note is None
        assert store.summary() == []
        assert store.check() == []


def test_damage_that_shows_only_when_rows_are_read_stops_nothing(path: Path) -> None:
    filled(path, rows(500))
    with ReferenceStore(path, PLENTY) as store, ReferenceStore(path, PLENTY) as second:
        with path.open("r+b") as file:
            for page in range(1, path.stat().st_size // 8192):
                file.seek(8192 * page + 8)
                file.write(b"\xa5" * 2000)
        damaged = path.read_bytes()
        assert store.note is None
        assert store.get(ME, list(rows(500))) == {}
        assert store.note is not None
        assert "damaged-1" in store.note
        store.put(ME, ABOUT, rows(500))
        assert store.get(ME, list(rows(500))) == rows(500)
        assert second.get(ME, list(rows(500))) == rows(500), "who sees the damage later moves no new store aside"
    assert read(path, list(rows(500))) == rows(500)
    (aside,) = path.parent.glob("*.damaged-?")
    assert aside.read_bytes() == damaged


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return filled(tmp_path_factory.mktemp("intact") / "store", rows(400)).read_bytes()


@given(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40), st.sampled_from(["change", "cut"]))
def test_no_damage_makes_a_wrong_value_or_stops_the_work(
    intact: bytes, where: float, garbage: bytes, kind: str
) -> None:
    at = 100 + int(where * (len(intact) - 100))  # behind the file's header
    values = rows(400)
    with scratch() as path:
        path.parent.mkdir()
        path.write_bytes(intact[:at] if kind == "cut" else intact[:at] + garbage + intact[at + len(garbage) :])
        with ReferenceStore(path, PLENTY) as store:
            store.check()
            for _ in range(2):
                assert right(store.get(ME, list(values)), values)
                store.put(ME, ABOUT, values)
            store.summary()


def test_a_damaged_name_is_damage_also_where_sqlite_cannot_quote_it(intact: bytes, path: Path) -> None:
    """Each in turn: a table's, in the first page, where its statement stands."""
    places = [found.start() for found in re.finditer(rb"entries|models", intact[:8192])]
    values = rows(5)
    path.parent.mkdir()
    assert places
    for at in places:
        path.write_bytes(intact[:at] + b"\x80" + intact[at + 1 :])
        with ReferenceStore(path, PLENTY) as store:
            store.check()
            assert right(store.get(ME, list(values)), values)
        for file in path.parent.iterdir():
            file.unlink()


def test_a_mistake_that_reads_no_text_moves_no_good_store_aside(path: Path) -> None:
    with closing(store_file.StoreFile(filled(path, rows(2)), lambda: None)) as file:
        with pytest.raises(UnicodeDecodeError):
            file.mending(lambda: b"\x80".decode())
        assert file.note is None
    assert read(path, list(rows(2))) == rows(2)


def test_a_store_of_another_version_is_moved_aside_with_its_own_sentence(path: Path) -> None:
    filled(path, rows(2))
    sql(path, "PRAGMA user_version = 7")
    with ReferenceStore(path, PLENTY) as store:
        assert store.note is not None
        assert "layout 7 of another version" in store.note
        assert "damaged" not in store.note
        assert store.summary() == []
    (aside,) = path.parent.glob("*.other-version-1")
    assert sql(aside, "SELECT count(*) FROM entries") == [(2,)]


def test_another_programs_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    sql(path, "CREATE TABLE theirs (column)")
    content = path.read_bytes()
    with pytest.raises(UserError, match="another program"):
        ReferenceStore(path, PLENTY)
    assert path.read_bytes() == content


def test_where_no_file_can_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file/store.sqlite3", "file/deeper/store.sqlite3", "."):
        with pytest.raises(UserError) as caught:
            ReferenceStore(tmp_path / place, PLENTY)
        (problem,) = caught.value.problems
        assert problem.where == "store.path"
        assert str(tmp_path) in problem.what
        assert "store.path=" in problem.mend


def test_a_store_that_cannot_be_written_is_told_before_anything_is_computed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path, rows(1))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="cannot be written"):
        ReferenceStore(path, PLENTY)


# Digests of files.


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file that is large enough to be remembered, and was not changed just now."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"w" * (1 << 20))
    age(file, 100)
    return file


def age(file: Path, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(file, (moment, moment))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were really read."""
    names: list[str] = []
    really = digests._sha256

    def counting(file: object) -> str:
        names.append(Path(file.name).name)  # type: ignore[attr-defined]
        return really(file)  # type: ignore[arg-type]

    monkeypatch.setattr(digests, "_sha256", counting)
    return names


def digest(path: Path, file: Path) -> str:
    with ReferenceStore(path, PLENTY) as store:
        return store.file_digest(file)


def test_an_unchanged_file_is_read_once(path: Path, weights: Path, hashed: list[str]) -> None:
    expected = hashlib.sha256(weights.read_bytes()).hexdigest()
    link = weights.with_name("link")
    link.symlink_to(weights)
    assert [digest(path, file) for file in (weights, weights, link)] == [expected] * 3
    assert hashed == [weights.name]


def test_a_change_that_keeps_the_size_is_noticed(path: Path, weights: Path, hashed: list[str]) -> None:
    before = digest(path, weights)
    weights.write_bytes(b"v" * (1 << 20))
    age(weights, 50)
    assert digest(path, weights) == hashlib.sha256(weights.read_bytes()).hexdigest() != before
    assert len(hashed) == 2


def test_another_file_in_its_place_is_noticed(path: Path, weights: Path, hashed: list[str]) -> None:
    before = digest(path, weights)
    other = weights.with_name("other")
    other.write_bytes(b"v" * (1 << 20))
    os.utime(other, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns))
    other.replace(weights)
    assert digest(path, weights) != before


@pytest.mark.parametrize("seconds", [0.0, 1.5, -100.0], ids=["now", "just now", "in the future"])
def test_a_file_that_was_changed_just_now_is_not_remembered(
    path: Path, weights: Path, hashed: list[str], seconds: float
) -> None:
    age(weights, seconds)
    assert digest(path, weights) == digest(path, weights)
    assert len(hashed) == 2


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = digests._sha256

    def slow(file: object) -> str:
        age(weights, 40)
        return really(file)  # type: ignore[arg-type]

    monkeypatch.setattr(digests, "_sha256", slow)
    digest(path, weights)
    assert sql(path, "SELECT * FROM files") == []


def test_a_small_file_is_hashed_each_time(path: Path, weights: Path, hashed: list[str]) -> None:
    weights.write_bytes(b"small")
    age(weights, 100)
    assert digest(path, weights) == digest(path, weights) == hashlib.sha256(b"small").hexdigest()
    assert len(hashed) == 2


def test_the_hub_names_its_blobs_by_their_digest(path: Path, tmp_path: Path, hashed: list[str]) -> None:
    blobs = tmp_path / "hub" / "models--an-owner--A-Model" / "blobs"
    snapshot = blobs.parent / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, content in (("0123456789abcdef" * 4, b"weights"), ("0123456789" * 4, b"a config")):
        (blobs / name).write_bytes(content)
        (snapshot / content.decode()).symlink_to(blobs / name)
    assert digest(path, snapshot / "weights") == "0123456789abcdef" * 4
    assert hashed == []
    assert digest(path, snapshot / "a config") == hashlib.sha256(b"a config").hexdigest()


def test_a_file_that_is_not_there_has_no_digest(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        digest(path, tmp_path / "blobs" / ("0" * 64))


def test_old_digests_make_room(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "REMEMBERED_FILES", 2)
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * (1 << 20))
        age(tmp_path / name, 100)
        digest(path, tmp_path / name)
    assert sql(path, "SELECT path FROM files ORDER BY path") == [(str(tmp_path / name),) for name in "bc"]


# For people.


def test_clear_takes_the_beginning_of_an_identity(path: Path) -> None:
    filled(path, rows(2), "abc1")
    filled(path, rows(3), "abc")
    filled(path, rows(4), "b")
    with ReferenceStore(path, PLENTY) as store:
        for refused in ("ab", "c", "", "abc12", "%"):
            with pytest.raises(UserError):
                store.clear(refused)
        assert store.clear("abc") == 3, "an identity that is the beginning of another one"
        assert store.clear("a") == 2
        assert store.clear(None) == 4
        assert store.clear(None) == 0
        assert store.summary() == []
        assert store.check() == []


def test_cleared_rows_never_come_back_under_another_identity(path: Path) -> None:
    with ReferenceStore(path, PLENTY) as store:
        store.put(ME, ABOUT, rows(5))
        store.clear(None)
        store.put(OTHER, ABOUT, rows(1, first=7))
        assert store.get(OTHER, list(rows(9))) == rows(1, first=7)
        assert store.get(ME, list(rows(9))) == {}


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (20 * 2**30, "20.0 GiB"), (2**41, "2.0 TiB")],
)
def test_sizes_are_shown_for_people(number: int, shown: str) -> None:
    assert human_size(number) == shown


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["store", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, said.out, said.err


def test_the_command_line_lists_checks_and_clears(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for each in ("list", "check", "clear"):
        assert command(monkeypatch, capsys, each, "--path", path)[:2] == (0, f"no store at {path} yet\n")
    assert not path.exists()
    filled(path, rows(1200))
    with ReferenceStore(path, PLENTY) as store:
        store.put(OTHER, {"model": "[bold]another[/bold]", "adapter": None}, rows(3))

    status, out, _ = command(monkeypatch, capsys, "list", "--path", path)
    assert status == 0
    mine = next(line for line in out.splitlines() if ME[:12] in line)
    assert all(word in mine for word in (*ABOUT.values(), "1,200", "117.2 KiB", f"{time.localtime().tm_year}-"))
    other = next(line for line in out.splitlines() if OTHER[:12] in line)
    assert "[bold]another[/bold]" in other
    assert other.split().count("-") == 5
    assert f"1,203 rows of 2 models, 117.5 KiB in {path}" in out

    assert command(monkeypatch, capsys, "check", "--path", path)[:2] == (0, "sound: 1,203 rows of 2 models\n")
    status, out, _ = command(monkeypatch, capsys, "clear", "bb", "--path", path)
    assert (status, out) == (0, f"3 rows of 300 B removed from {path}\n")
    status, out, _ = command(monkeypatch, capsys, "clear", "--path", path)
    assert (status, out) == (0, f"1,200 rows of 117.2 KiB removed from {path}\n")


def test_the_command_line_tells_damage(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(path, rows(30))
    sql(path, "UPDATE contents SET value = x'00'")
    status, out, _ = command(monkeypatch, capsys, "check", "--path", path)
    assert status == 1
    assert f"30 problems in {path}" in out
    assert "and 10 more" in out
    path.write_bytes(b"no database")
    assert "damaged-1" in command(monkeypatch, capsys, "list", "--path", path)[1]
    path.write_bytes(b"no database")
    status, out, _ = command(monkeypatch, capsys, "check", "--path", path)
    assert status == 1
    assert "damaged-2" in out


@pytest.mark.parametrize("arguments", [["clear", "zz"], ["list", "aa"], ["look"], []])
def test_what_the_user_can_mend_ends_with_status_2(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    filled(path, rows(1))
    status, out, err = command(monkeypatch, capsys, *arguments, "--path", path)
    assert (status, out) == (2, "")
    assert "error: " in err
    assert "Traceback" not in err


def test_the_command_answers_from_the_users_cache_without_heavy_imports(tmp_path: Path) -> None:
    code = "import json, sys; from lora_exp.store import run, default_path; run('list', None, default_path()); "
    code += (
        "print(json.dumps(sorted(set(sys.modules) & {'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy'})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "LORA_EXP_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    where, imported = done.stdout.splitlines()
    assert where == f"no store at {tmp_path / 'reference.sqlite3'} yet"
    assert json.loads(imported) == []


def test_the_store_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path))
    assert default_path() == tmp_path / "reference.sqlite3"
