"""Preference rows: three texts, kept as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.data.kinds import PREFERENCE
from lora_exp.data.preference import load_preference_jsonl
from lora_exp.data.texts import CompletionRow, PreferenceRow
from lora_exp.errors import UserError
from tests.rows import EXAMPLES, Example, assistant, call, user

Make = Callable[..., dict[str, Any]]
COLUMNS = ["prompt", "chosen", "rejected"]
texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)
rows_of_texts = st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, texts)), min_size=1, max_size=6)


def test_a_file_becomes_a_dataset_of_exactly_the_three_columns(
    tmp_path: Path, write_jsonl: Callable[..., Path], preference: Make
) -> None:
    rows = [preference(), preference(prompt="And now?", id="x", score=3)]
    dataset = load_preference_jsonl(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert dataset.column_names == COLUMNS
    assert dataset.to_list() == [{key: row[key] for key in COLUMNS} for row in rows]


def test_the_path_may_be_a_string(tmp_path: Path, write_jsonl: Callable[..., Path], preference: Make) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [preference()])
    assert load_preference_jsonl(str(path)).to_list() == load_preference_jsonl(path).to_list()


@settings(max_examples=30)
@given(rows=rows_of_texts)
def test_valid_rows_come_back_unchanged(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    path = tmp_path_factory.getbasetemp() / "preferences.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    assert load_preference_jsonl(path).to_list() == rows


@given(row=st.fixed_dictionaries(dict.fromkeys(COLUMNS, texts)), before=st.sampled_from(["", " ", "\n"]))
def test_blanks_around_a_text_are_kept(row: dict[str, str], before: str) -> None:
    padded = {key: f"{before}{value}{before}" for key, value in row.items()}
    assert PreferenceRow.model_validate(padded).columns() == padded


@pytest.mark.parametrize("row_type", [PreferenceRow, CompletionRow])
def test_a_row_has_the_columns_that_it_declares(row_type: type[PreferenceRow] | type[CompletionRow]) -> None:
    row = {name: f"the {name}" for name in row_type.model_fields}
    assert row_type.model_validate(row).columns() == row


@pytest.mark.parametrize("key", COLUMNS)
@pytest.mark.parametrize(
    ("value", "reason"),
    [("", "is empty"), (" \n", "is empty"), (None, "not null"), (7, "not a number"), ([], "not a list")],
    ids=repr,
)
def test_a_text_that_is_none_is_refused_by_file_line_and_key(
    tmp_path: Path, write_jsonl: Callable[..., Path], preference: Make, key: str, value: object, reason: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [preference(), preference(**{key: value})])
    with pytest.raises(UserError) as caught:
        load_preference_jsonl(path)
    (problem,) = caught.value.problems
    assert problem.where == f"{path}:2"
    assert problem.what.startswith(f"{key}: ")
    assert problem.what.endswith(reason)


def test_a_file_of_another_recipes_rows_names_that_recipe(
    tmp_path: Path, write_jsonl: Callable[..., Path], record: Make
) -> None:
    with pytest.raises(UserError) as caught:
        load_preference_jsonl(write_jsonl(tmp_path / "rows.jsonl", [record()]))
    assert caught.value.problems[0].what == "looks like a DataRecord row: recipe=sft"


@pytest.mark.parametrize("example", [each for each in EXAMPLES if each.kind is PREFERENCE], ids=lambda each: each.name)
def test_rows_of_any_format_come_back_as_their_columns(
    example: Example, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    columns = PREFERENCE.recognise(example.row).row.model_validate(example.row).columns()
    dataset = load_preference_jsonl(write_jsonl(tmp_path / "rows.jsonl", [example.row] * 2))
    assert dataset.column_names == COLUMNS
    assert dataset.to_list() == [columns] * 2


def test_tool_calls_come_back_with_their_own_arguments(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = [
        {
            "prompt": [user("Rain?")],
            "chosen": [assistant("", tool_calls=[call(**arguments)])],
            "rejected": [assistant("No.")],
        }
        for arguments in ({"city": "Oslo"}, {"days": [1, 2]})
    ]
    assert load_preference_jsonl(write_jsonl(tmp_path / "rows.jsonl", rows)).to_list() == rows
