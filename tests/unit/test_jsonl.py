"""Every bad line of every file is reported at once, as `file:line: reason`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.data import jsonl
from lora_exp.data.cache import NO_CACHE
from lora_exp.data.jsonl import MAX_DEPTH, SHOWN, parse
from lora_exp.data.kinds import PREFERENCE
from lora_exp.data.read import read_file, read_files
from lora_exp.errors import Problem, UserError

GOOD = '{"prompt": "p", "chosen": "c", "rejected": "r"}'
BAD_LINES = {
    "not JSON": ('{"prompt": "p", "chosen": "c"', "not JSON"),
    "two objects": (f"{GOOD} {GOOD}", "not JSON"),
    "a list": ("[1, 2]", "a row must be an object, not a list"),
    "a string": ('"prompt"', "a row must be an object, not a string"),
    "a number": ("3.5", "a row must be an object, not a number"),
    "null": ("null", "a row must be an object, not null"),
    "true": ("true", "a row must be an object, not true or false"),
    "a missing field": ('{"prompt": "p", "chosen": "c"}', "rejected: is missing"),
    "an empty field": ('{"prompt": "", "chosen": "c", "rejected": "r"}', "prompt: is empty"),
    "a blank field": ('{"prompt": "p", "chosen": " \\t\\n", "rejected": "r"}', "chosen: is empty"),
    "a number for a text": ('{"prompt": 1, "chosen": "c", "rejected": "r"}', "should be a string, not a number"),
    "null for a text": ('{"prompt": null, "chosen": "c", "rejected": "r"}', "should be a string, not null"),
    "a list for a text": ('{"prompt": ["p"], "chosen": "c", "rejected": "r"}', "should be a string, not a list"),
    "half a character": ('{"prompt": "\\ud800", "chosen": "c", "rejected": "r"}', "prompt: "),
    "brackets without end": ("[" * 100_000, "nested too deeply"),
    "a number without end": ('{"n": ' + "9" * 5_000 + "}", "a number of 5,000 digits"),
    "one level too many": ('{"a": ' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "nested too deeply"),
    "a number too large": ('{"prompt": 1e999}', "1e999 is too large"),
    "NaN": ('{"prompt": NaN}', "not JSON: NaN; a row may only have numbers that are finite"),
    "Infinity": ('{"prompt": "p", "score": Infinity}', "not JSON: Infinity"),
    "minus Infinity": ('{"prompt": "p", "x": [{"y": -Infinity}]}', "not JSON: -Infinity"),
    "a key twice": (GOOD[:-1] + ', "chosen": "d"}', "an object has the key 'chosen' twice"),
    "a key twice inside": (GOOD[:-1] + ', "meta": [{"a": 1, "a": 1}]}', "an object has the key 'a' twice"),
    "NUL": ("\0" * 40, "has NUL bytes (the first is byte 1 of the line): the file was not written whole"),
    "NUL at the end": (GOOD + "\0\0", "has NUL bytes (the first is byte 48 of the line)"),
    "a raw control character": ('{"prompt": "a\x01b"}', "not JSON: Invalid control character"),
    "a byte-order mark": ("\ufeff" + GOOD, "byte-order mark, which only the start of a file may have"),
}


def rows_of(*paths: Path) -> list[list[Any]]:
    return [list(file.rows) for file in read_files(list(paths), PREFERENCE, NO_CACHE)]


def refusal(*paths: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        rows_of(*paths)
    return caught.value


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_reported_with_its_file_its_number_and_its_reason(
    tmp_path: Path, write_jsonl: Callable[..., Path], line: str, reason: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, line, GOOD])
    error = refusal(path)
    (problem,) = error.problems
    assert problem.where == f"{path}:2"
    assert reason in problem.what
    assert problem.what
    assert f"{path}:2: {problem.what}" in str(error)
    assert "\n" not in problem.what


def test_all_reasons_of_a_line_stand_behind_it(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    (problem,) = refusal(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": 3, "chosen": ""}])).problems
    assert all(f"{key}: " in problem.what for key in ("prompt", "chosen", "rejected"))


def test_the_bad_lines_of_all_files_are_reported_together(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", ["{", GOOD, "[]"])
    second = write_jsonl(tmp_path / "second.jsonl", [GOOD, "{}"])
    error = refusal(first, second)
    assert [problem.where for problem in error.problems] == [f"{first}:1", f"{first}:3", f"{second}:2"]
    assert error.title.startswith("3 lines")


@pytest.mark.parametrize("extra", [0, 1, 7])
def test_the_first_bad_lines_are_named_and_the_rest_counted(
    tmp_path: Path, write_jsonl: Callable[..., Path], extra: int
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ["{"] * (SHOWN + extra))
    error = refusal(path)
    named, rest = error.problems[:SHOWN], error.problems[SHOWN:]
    assert [problem.where for problem in named] == [f"{path}:{number + 1}" for number in range(SHOWN)]
    assert [problem.where for problem in rest] == [str(path)] * (extra > 0)
    assert all(f"{extra} more bad line" in problem.what for problem in rest)
    assert error.title.startswith(f"{SHOWN + extra} lines")


def test_twenty_lines_are_named() -> None:
    assert SHOWN == 20


def test_bytes_that_are_not_utf_8_are_reported_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + b'{"prompt": "caf\xe9"}\n' + GOOD.encode("utf-16"))
    first, second, *_ = refusal(path).problems
    assert first == Problem(f"{path}:2", "not UTF-8 (byte 16 of the line)")
    assert second.where == f"{path}:3"
    assert second.what.startswith("not UTF-8")


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n", "\ufeff\n"], ids=["plain", "BOM", "blank", "BOM and blank"])
@pytest.mark.parametrize("last", ["", "\n", "\n \t\n"], ids=["no newline", "newline", "blank lines"])
def test_byte_order_marks_blank_lines_and_line_ends_are_no_part_of_the_rows(
    tmp_path: Path, start: str, last: str, end: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((start + GOOD + "\n\n   \n" + GOOD + last).replace("\n", end).encode())
    (rows,) = rows_of(path)
    assert rows == [json.loads(GOOD)] * 2


def test_blank_lines_count_as_lines(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ["", GOOD, " ", "{}"])
    assert [problem.where for problem in refusal(path).problems] == [f"{path}:4"]


@pytest.mark.parametrize("content", ["", "\n \n"], ids=["empty", "blank"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    assert refusal(path).problems == [Problem(str(path), "has no rows")]


def test_missing_files_are_all_reported_with_the_files_that_are_there(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl(tmp_path / "training.jsonl", [GOOD])
    absent, elsewhere = tmp_path / "train.jsonl", tmp_path / "no_folder" / "val.jsonl"
    first, second = refusal(absent, elsewhere).problems
    assert (first.where, second.where) == (str(absent), str(elsewhere))
    assert "training.jsonl" in first.mend
    assert str(elsewhere.parent) in second.mend


@pytest.mark.parametrize("levels", [1, MAX_DEPTH - 1])
def test_what_is_nested_less_deeply_is_read(levels: int) -> None:
    assert parse(b'{"a": ' + b"[" * levels + b"]" * levels + b"}")


def test_many_brackets_beside_each_other_are_not_deep() -> None:
    assert parse(json.dumps({"code": "{[(" * 1000, "list": [[{}]] * 1000}).encode())


def test_a_line_too_long_is_told_without_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real limit is tried where files are read."""
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", len(GOOD))
    assert parse(GOOD.encode())
    with pytest.raises(ValueError, match="is longer than 16 MiB"):
        parse(GOOD.encode() + b" ")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(value=st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), values))
def test_what_the_standard_library_writes_is_read_as_it_was(value: dict[str, Any]) -> None:
    assert parse(json.dumps(value, allow_nan=False).encode()) == value


@given(good=st.lists(st.booleans(), min_size=1, max_size=40))
def test_exactly_the_bad_lines_are_reported(good: list[bool]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(f"{GOOD if fine else '{}'}\n" for fine in good), encoding="utf-8")
        file = read_file(path, PREFERENCE, NO_CACHE)
        assert len(file.rows) == sum(good)
        # Without a row that is of any format, the first is told and not each of them.
        bad = [f"{path}:{number}" for number, fine in enumerate(good, start=1) if not fine][: None if any(good) else 1]
        assert file.bad == len(bad)
        assert [problem.where for problem in file.problems] == bad[:SHOWN]


@given(lines=st.lists(st.binary(max_size=30), max_size=8))
def test_no_bytes_end_in_anything_but_rows_or_a_list_of_problems(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"\n".join(lines))
        number_of_lines = path.read_bytes().count(b"\n") + 1
        error = refusal(path)
        assert error.problems
        for problem in error.problems[:SHOWN]:
            number = problem.where.removeprefix(str(path)).removeprefix(":")
            assert number == "" or 1 <= int(number) <= number_of_lines
