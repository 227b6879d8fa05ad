"""Files of rows in every form: what is in them, and what is said of those that are not what they should be."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.config import DataConfig
from lora_exp.data.cache import NO_CACHE
from lora_exp.data.files import BLOCK_BYTES, MAX_LINE_BYTES, SUFFIXES, Unreadable, blocks, place
from lora_exp.data.kinds import COMPLETION, PREFERENCE, RowKind
from lora_exp.data.load import load_splits
from lora_exp.data.read import read_file, read_files
from lora_exp.errors import Problem, UserError

Make = Callable[..., dict[str, Any]]
forms = pytest.mark.parametrize("suffix", SUFFIXES)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the form that the name asks for."""
    if path.name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3, write_page_checksum=True)
        return path
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.name.endswith(".zst"):
        import pyarrow

        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if path.name.endswith(".gz") else lines)
    return path


def read(path: Path, kind: RowKind = PREFERENCE) -> list[dict[str, Any]]:
    (file,) = read_files([path], kind, NO_CACHE)
    return list(file.rows)


def refusal(path: Path, kind: RowKind = PREFERENCE) -> Problem:
    """Return the one problem of a file, whose message is one line."""
    with pytest.raises(UserError) as caught:
        read(path, kind)
    (problem,) = caught.value.problems
    assert "\n" not in problem.what
    return problem


@pytest.fixture
def rows(preference: Make) -> list[dict[str, Any]]:
    return [preference(prompt=f"Frage {number}, größer als zuvor?") for number in range(10)]


# What is in them.


@forms
def test_every_form_holds_the_same_rows(tmp_path: Path, rows: list[dict[str, Any]], suffix: str) -> None:
    assert read(write(tmp_path / f"rows{suffix}", rows)) == rows


@forms
def test_every_form_is_found_by_the_usual_name(tmp_path: Path, rows: list[dict[str, Any]], suffix: str) -> None:
    train, val = (write(tmp_path / f"{name}.dpo{suffix}", rows) for name in ("train", "val"))
    splits = load_splits(DataConfig(splits_dir=str(tmp_path)), PREFERENCE)
    assert [split.source for split in splits.values()] == [str(train), str(val)]
    assert all(split.rows == rows for split in splits.values())


@forms
def test_every_form_can_be_named(tmp_path: Path, rows: list[dict[str, Any]], suffix: str) -> None:
    mine = write(tmp_path / f"mine{suffix}", rows)
    for config in (DataConfig(train_file=str(mine)), DataConfig(splits_dir=str(tmp_path), train_file=mine.name)):
        write(tmp_path / "val.dpo.jsonl", rows)
        assert load_splits(config, PREFERENCE)["train"].rows == rows


def test_plain_lines_come_first_of_several_forms_of_a_name(tmp_path: Path, preference: Make) -> None:
    for suffix in SUFFIXES:
        write(tmp_path / f"train.dpo{suffix}", [preference(prompt=suffix)])
    for suffix in SUFFIXES:
        config = DataConfig(splits_dir=str(tmp_path), val_file=str(write(tmp_path / "v.jsonl", [preference()])))
        assert load_splits(config, PREFERENCE)["train"].rows[0]["prompt"] == suffix
        (tmp_path / f"train.dpo{suffix}").unlink()


@forms
def test_a_bad_row_has_its_place_in_every_form(tmp_path: Path, rows: list[dict[str, Any]], suffix: str) -> None:
    rows[6]["chosen"] = " "
    path = write(tmp_path / f"rows{suffix}", rows)
    where = f"{path}:row 7" if suffix == ".parquet" else f"{path}:7"
    assert refusal(path) == Problem(where, "chosen: is empty")
    assert place(path, 7) == where


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_parts_that_were_compressed_apart_are_one_file(tmp_path: Path, rows: list[dict[str, Any]], suffix: str) -> None:
    first, second = (write(tmp_path / f"{name}{suffix}", part) for name, part in (("a", rows[:4]), ("b", rows[4:])))
    both = tmp_path / f"rows{suffix}"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    assert read(both) == rows


def test_parquet_has_nulls_where_a_row_lacks_a_key_and_times_as_such(tmp_path: Path, record: Make) -> None:
    made = [record(id="a"), record(id="b", meta__timestamp=datetime(2026, 1, 5, 8, 11, tzinfo=UTC))]
    made[0]["meta"]["timestamp"] = datetime(2026, 1, 5, tzinfo=UTC)
    del made[0]["inputs"]["context"]
    columns = read(write(tmp_path / "rows.parquet", made), COMPLETION)
    assert [row["prompt"] for row in columns] == [
        "Where is my parcel?",
        "Where is my parcel?\n\nLeft the depot at 8:00",
    ]


@given(size=st.integers(1, 400))
def test_blocks_hold_whole_lines_and_all_of_them(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    lines = [b"x" * length for length in (3, 0, 200, 1, 90, 0)]
    path.write_bytes(b"\n".join(lines))
    found = list(blocks(path, size))
    assert b"".join(block.data for block in found) == b"\n".join(lines)
    assert all(block.data.endswith(b"\n") for block in found[:-1])
    for block, before in zip(found, ([], *found), strict=False):
        assert block.first == (before.first + before.data.count(b"\n") if before else 1)


# What they are not.


def test_a_folder_names_the_files_in_it(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write(tmp_path / "train.jsonl.gz", rows)
    assert refusal(tmp_path) == Problem(str(tmp_path), "is a folder, not a file", f"{tmp_path} has train.jsonl.gz")


def test_a_device_is_no_file() -> None:
    assert refusal(Path("/dev/null")).what == "is no regular file"


def test_a_file_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.symlink_to(path)
    assert refusal(path).what == "cannot be read: Too many levels of symbolic links"


@forms
def test_an_empty_file_has_no_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.touch()
    assert refusal(path) == Problem(str(path), "has no rows")


@pytest.mark.parametrize("suffix", SUFFIXES[:3])
def test_a_file_of_blank_lines_has_no_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}", [])
    assert refusal(path) == Problem(str(path), "has no rows")


@pytest.mark.parametrize("named", SUFFIXES)
@pytest.mark.parametrize("form", SUFFIXES)
def test_a_file_of_another_form_than_its_name_says_is_told(
    tmp_path: Path, rows: list[dict[str, Any]], named: str, form: str
) -> None:
    path = write(tmp_path / f"rows{form}", rows).rename(tmp_path / f"other{named}")
    if named == form:
        assert read(path) == rows
        return
    problem = refusal(path)
    names = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd", ".parquet": "Parquet"}
    assert problem.where == str(path)
    if form == ".jsonl":
        assert problem.what == f"is no {names[named]} file, though its name says so"
    else:
        assert problem == Problem(str(path), f"is a {names[form]} file", f"let its name end in {form}")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_recognised(tmp_path: Path, rows: list[dict[str, Any]], encoding: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode(encoding))
    assert refusal(path).what == "is UTF-16, not UTF-8" or encoding == "utf-32"
    assert "iconv" in refusal(path).mend


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("start", ["", "\ufeff", " \n"])
def test_a_json_array_is_recognised(tmp_path: Path, rows: list[dict[str, Any]], indent: int | None, start: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(start + json.dumps(rows, indent=indent), encoding="utf-8")
    assert refusal(path).what == "is one JSON array, not JSON Lines: one object a line"


@forms
def test_a_file_that_ends_too_early_is_told(tmp_path: Path, rows: list[dict[str, Any]], suffix: str) -> None:
    whole = write(tmp_path / f"rows{suffix}", rows).read_bytes()
    for length in range(4, len(whole), 7):
        path = tmp_path / f"part{suffix}"
        path.write_bytes(whole[:length])
        if suffix == ".jsonl":
            last = whole[:length].count(b"\n") + 1
            assert whole[:length].endswith((b"\n", b"}")) or refusal(path).where == f"{path}:{last}"
        else:
            problem = refusal(path)
            assert problem.where == str(path)
            assert problem.what.startswith(("is damaged: ", "is no Parquet file"))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
@given(data=st.data())
def test_no_damage_passes_for_other_rows(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    """zstd has no checksum unless its writer asks for one."""
    folder = tmp_path_factory.mktemp("damage")
    rows = [{"prompt": f"p{number}", "chosen": "c" * number, "rejected": "r"} for number in range(1, 9)]
    whole = bytearray(write(folder / f"rows{suffix}", rows).read_bytes())
    place_ = data.draw(st.integers(4, len(whole) - 1))
    whole[place_] ^= 1 << data.draw(st.integers(0, 7))
    path = folder / f"damaged{suffix}"
    path.write_bytes(whole)
    try:
        found = read(path)
    except UserError as error:
        assert error.problems  # noqa: PT017
    else:
        assert found == rows


# What happens while they are read.


def _lines(path: Path) -> Path:
    path.write_bytes(b"".join(b'{"n": %d}\n' % number for number in range(1000)))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 500),
        lambda path: os.truncate(path, 0),
        lambda path: path.open("ab").write(b"{}\n"),
        lambda path: path.write_bytes(b"{}\n" * 3),
    ],
    ids=["cut", "emptied", "added to", "written anew"],
)
def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = _lines(tmp_path / "rows.jsonl")
    reading = blocks(path, 100)
    next(reading)
    change(path)
    with pytest.raises(Unreadable, match="was changed while it was read"):
        list(reading)


def test_a_compressed_file_that_is_cut_while_it_is_read_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(os.urandom(200_000)))
    reading = blocks(path, 100)
    next(reading)
    os.truncate(path, 150_000)
    with pytest.raises(Unreadable, match="was changed while it was read"):
        list(reading)


@forms
def test_a_file_that_is_removed_while_it_is_read_is_read_to_its_end(
    tmp_path: Path, rows: list[dict[str, Any]], suffix: str
) -> None:
    path = write(tmp_path / f"rows{suffix}", rows)
    whole = list(blocks(path, 100))
    reading = blocks(path, 100)
    first = next(reading)
    path.unlink()
    assert [first, *reading] == whole


@forms
def test_a_file_that_vanishes_before_it_is_read_is_told(
    tmp_path: Path, rows: list[dict[str, Any]], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / f"rows{suffix}", rows)
    path.unlink()
    with pytest.raises(Unreadable, match="is no longer there"):
        list(blocks(path))
    assert "No such file" in read_file(path, PREFERENCE, NO_CACHE).problems[0].what


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_of_100_mb_is_passed_over_in_the_memory_of_a_few_blocks(
    tmp_path: Path, rows: list[dict[str, Any]], suffix: str
) -> None:
    import tracemalloc

    path = tmp_path / f"rows{suffix}"
    good = json.dumps(rows[0]).encode()
    with gzip.open(path, "wb", compresslevel=1) if suffix.endswith("gz") else path.open("wb") as file:
        file.write(good + b"\n")
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b"\n" + good + b"\n{}\n")
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    first, second = caught.value.problems
    assert first == Problem(f"{path}:2", "is longer than 16 MiB, which is no row that a model can learn from")
    assert second.where == f"{path}:4"
    assert peak < 3 * (MAX_LINE_BYTES + BLOCK_BYTES)


def test_a_line_without_end_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(MAX_LINE_BYTES + BLOCK_BYTES + 1)
    assert refusal(path).where == f"{path}:1"
