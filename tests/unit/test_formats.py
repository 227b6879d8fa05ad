"""A row's format is known by its keys; any row goes through a line of JSON and becomes the columns that it means."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_exp.config import DataConfig
from lora_exp.data.cache import NO_CACHE
from lora_exp.data.chat import Exchange
from lora_exp.data.kinds import COMPLETION, KINDS, PREFERENCE, RowKind
from lora_exp.data.load import load_splits
from lora_exp.data.read import read_files
from lora_exp.data.reasons import reasons
from lora_exp.errors import UserError
from tests.rows import ASKED, EXAMPLES, PAIR, Example, assistant, json_values

Write = Callable[..., Path]
examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda each: each.name)
mixed = [(one, other) for one, other in permutations(EXAMPLES, 2) if one.kind is other.kind]


def refusal(path: Path, kind: RowKind) -> UserError:
    with pytest.raises(UserError) as caught:
        read_files([path], kind, NO_CACHE)
    return caught.value


def test_every_format_has_an_example() -> None:
    formats = {(id(kind), each.name) for kind in KINDS for each in kind.formats}
    assert formats == {(id(each.kind), each.name) for each in EXAMPLES}


# Round trips.


@examples
@given(data=st.data())
def test_a_row_goes_through_a_line_of_json_and_becomes_the_columns_that_it_means(
    example: Example, data: st.DataObject
) -> None:
    row, columns = data.draw(example.drawn)
    line = json.dumps(row, ensure_ascii=data.draw(st.booleans()))
    read = json.loads(line)
    row_format = example.kind.recognise(read)
    assert row_format.name == example.name
    assert row_format.row.model_validate(read).columns() == columns
    assert row_format.row.model_validate_json(line).columns() == columns


@examples
@given(data=st.data())
def test_columns_have_what_their_kind_learns_from(example: Example, data: st.DataObject) -> None:
    _, columns = data.draw(example.drawn)
    expected = {"messages"} if example.name == "messages" else {"prompt", *example.kind.answers}
    assert set(columns) - {"tools"} == expected


@examples
def test_other_keys_are_left_out(example: Example) -> None:
    row_format = example.kind.recognise({"score": 0.5, **example.row})
    plain = row_format.row.model_validate(example.row).columns()
    assert row_format.row.model_validate({**example.row, "score": 0.5, "tags": ["a"]}).columns() == plain


@examples
def test_a_file_says_its_format(example: Example, tmp_path: Path, write_jsonl: Write) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [example.row, {**example.row, "id": "2"}])
    split = load_splits(DataConfig(train_file=str(path)), example.kind)["train"]
    assert (split.format, len(split.rows)) == (example.name, 2)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the places of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, each in inner for place in places(each, (*here, key)))]


def changed(value: Any, place: tuple[Any, ...], other: Any) -> Any:
    """Return a copy of a JSON value with another value in one place."""
    if not place:
        return other
    copy = value.copy()
    copy[place[0]] = changed(value[place[0]], place[1:], other)
    return copy


@examples
@given(data=st.data())
def test_a_row_with_anything_in_any_place_is_right_or_told_what_is_wrong(example: Example, data: st.DataObject) -> None:
    row, _ = data.draw(example.drawn)
    place = data.draw(st.sampled_from(places(row)[1:]))
    row = changed(row, place, data.draw(json_values | st.sampled_from(["", " ", [], {}, "user", "assistant"])))
    row_format = example.kind.recognise(row)
    try:
        columns, wrong = row_format.row.model_validate(row).columns(), ""
    except ValidationError as error:
        columns, wrong = {}, reasons(error)
    if not columns:
        assert all(part.partition(": ")[2] for part in wrong.split("; "))
        return
    exchange = Exchange.of(columns, example.kind.answers)
    for answer in exchange.answers.values():
        assert answer[0]["role"] == answer[-1]["role"] == "assistant"
    assert exchange.asked
    assert exchange.asked[-1]["role"] != "assistant"
    json.dumps(columns)


# What is recognised.


@examples
def test_the_order_of_keys_does_not_matter(example: Example) -> None:
    for keys in permutations(example.row):
        assert example.kind.recognise({key: example.row[key] for key in keys}).name == example.name


@pytest.mark.parametrize(
    ("kind", "row", "name"),
    [
        (PREFERENCE, {"prompt": "Where?", "chosen": ASKED, "rejected": ASKED}, "implicit-prompt preference messages"),
        (COMPLETION, {"prompt": "Where?", "messages": ASKED}, "messages"),
        (COMPLETION, {"prompt": 3, "completion": ""}, "prompt-completion"),
        (COMPLETION, {"prompt": [], "completion": ""}, "prompt-completion"),
        (COMPLETION, {"messages": "text"}, "messages"),
        (COMPLETION, {"inputs": {}}, "DataRecord"),
        (PREFERENCE, {"prompt": "Where?", "chosen": "There."}, "preference"),
        (PREFERENCE, {"prompt": ASKED, "chosen": [assistant("There.")]}, "preference messages"),
    ],
    ids=str,
)
def test_a_row_that_is_not_right_is_taken_for_the_format_that_it_is_most_like(
    kind: RowKind, row: dict[str, Any], name: str
) -> None:
    assert kind.recognise(row).name == name


@pytest.mark.parametrize("kind", KINDS)
@given(row=st.dictionaries(st.text(max_size=5), st.none() | st.text(max_size=5), max_size=4))
def test_what_has_no_format_is_told_with_what_it_has_and_what_there_is(kind: RowKind, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no row of these formats") as caught:
        kind.recognise({f"my {key}": value for key, value in row.items()})
    assert all(f"my {key}" in str(caught.value) for key in row)
    assert all(each.name in str(caught.value) for each in kind.formats)


@examples
def test_rows_of_the_other_recipe_are_told_with_that_recipe(
    example: Example, tmp_path: Path, write_jsonl: Write
) -> None:
    (other,) = (kind for kind in KINDS if kind is not example.kind)
    (problem, *_) = refusal(write_jsonl(tmp_path / "rows.jsonl", [example.row]), other).problems
    assert problem.what in [f"looks like {a} {example.name} row: {example.kind.override}" for a in ("a", "an")]


# Two formats in a file.


@pytest.mark.parametrize(("one", "other"), mixed, ids=lambda each: each.name)
def test_two_formats_in_a_file_are_told_with_the_line(
    one: Example, other: Example, tmp_path: Path, write_jsonl: Write
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [one.row, {**one.row, "id": "2"}, other.row])
    (problem,) = refusal(path, one.kind).problems
    assert problem.where == f"{path}:3"
    assert problem.what in [f"is {a} {other.name} row, the file began with {one.name} rows" for a in ("a", "an")]


@pytest.mark.parametrize(("one", "other"), [(EXAMPLES[0], EXAMPLES[5]), (EXAMPLES[6], EXAMPLES[3])])
def test_a_row_of_the_other_recipe_in_a_file_is_told_with_the_line(
    one: Example, other: Example, tmp_path: Path, write_jsonl: Write
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [one.row, other.row])
    (problem,) = refusal(path, one.kind).problems
    assert problem.where == f"{path}:2"
    assert problem.what in [f"is {a} {other.name} row, the file began with {one.name} rows" for a in ("a", "an")]


@examples
def test_a_bad_row_of_the_files_own_format_is_told_for_what_is_wrong(
    example: Example, tmp_path: Path, write_jsonl: Write
) -> None:
    key = list(example.row)[-1]
    path = write_jsonl(tmp_path / "rows.jsonl", [example.row, {**example.row, key: None}])
    (problem,) = refusal(path, example.kind).problems
    assert problem.where == f"{path}:2"
    assert problem.what.startswith(f"{key}: ")


def test_one_files_format_is_not_anothers(tmp_path: Path, write_jsonl: Write) -> None:
    strings = {"prompt": "Where?", "chosen": "There.", "rejected": "No."}
    train = write_jsonl(tmp_path / "train.dpo.jsonl", [strings])
    val = write_jsonl(tmp_path / "val.dpo.jsonl", [{"prompt": ASKED, **PAIR}])
    splits = load_splits(DataConfig(train_file=str(train), val_file=str(val)), PREFERENCE)
    assert [split.format for split in splits.values()] == ["preference", "preference messages"]
