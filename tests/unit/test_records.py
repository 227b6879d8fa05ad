"""DataRecord: what it accepts, what it trims, and the prompt that it becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_exp.data.cache import NO_CACHE
from lora_exp.data.kinds import COMPLETION
from lora_exp.data.read import read_files
from lora_exp.data.records import DataRecord
from lora_exp.errors import UserError

Make = Callable[..., dict[str, Any]]
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(lambda text: text == text.strip())
blanks = st.text(" \t\n\r\u00a0\u3000", max_size=3)
REQUIRED = ["id", "schema_version", "inputs", "inputs__question", "outputs", "outputs__answer"]
REQUIRED += ["meta", "meta__source", "meta__timestamp", "meta__tags"]
TEXTS = ["id", "inputs__question", "outputs__answer", "meta__source"]


def without(row: dict[str, Any], path: str) -> dict[str, Any]:
    *sections, key = path.split("__")
    place = row
    for section in sections:
        place = place[section]
    del place[key]
    return row


def reasons(row: dict[str, Any], folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_files([path], COMPLETION, NO_CACHE)
    (problem,) = caught.value.problems
    assert problem.where == f"{path}:1"
    return problem.what


def test_a_complete_row_is_accepted(record: Make) -> None:
    assert DataRecord.model_validate(record()).id == record()["id"]


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_field_is_named(record: Make, tmp_path: Path, path: str) -> None:
    assert reasons(without(record(), path), tmp_path) == f"{path.replace('__', '.')}: is missing"


@pytest.mark.parametrize("path", TEXTS)
@pytest.mark.parametrize("value", ["", " \t\n"], ids=["empty", "blank"])
def test_an_empty_text_is_named(record: Make, tmp_path: Path, path: str, value: str) -> None:
    assert reasons(record(**{path: value}), tmp_path) == f"{path.replace('__', '.')}: is empty"


@pytest.mark.parametrize("path", [*TEXTS, "meta__timestamp", "inputs__context"])
@pytest.mark.parametrize(("value", "name"), [(3, "a number"), (["x"], "a list"), (True, "true or false")])
def test_a_wrong_type_is_named_with_what_was_given(
    record: Make, tmp_path: Path, path: str, value: object, name: str
) -> None:
    expected = f"{path.replace('__', '.')}: should be a string, not {name}"
    assert reasons(record(**{path: value}), tmp_path) == expected


@pytest.mark.parametrize("section", ["inputs", "outputs", "meta"])
def test_a_section_that_is_no_object_is_named(record: Make, tmp_path: Path, section: str) -> None:
    assert reasons(record(**{section: "text"}), tmp_path).startswith(f"{section}: should be an object")


def test_tags_are_a_list_of_texts_that_may_be_empty(record: Make, tmp_path: Path) -> None:
    assert DataRecord.model_validate(record(meta__tags=[])).meta.tags == []
    assert reasons(record(meta__tags="parcel"), tmp_path).startswith("meta.tags: should be a list")
    assert reasons(record(meta__tags=["a", " "]), tmp_path) == "meta.tags.1: is empty"


@pytest.mark.parametrize("version", ["1.1", "2.0", 1.0, None])
def test_another_schema_version_is_refused(record: Make, tmp_path: Path, version: object) -> None:
    assert reasons(record(schema_version=version), tmp_path).startswith("schema_version: ")


def test_all_that_is_wrong_with_a_row_is_told_at_once(record: Make, tmp_path: Path) -> None:
    told = reasons(without(record(inputs__question="", meta__source=3), "id"), tmp_path)
    assert all(place in told for place in ("inputs.question: ", "meta.source: ", "id: "))


@pytest.mark.parametrize("context", [None, "", "  \n"], ids=["null", "empty", "blank"])
def test_a_prompt_without_context_is_the_question(record: Make, context: str | None) -> None:
    row = DataRecord.model_validate(record(inputs__question="Why?", inputs__context=context))
    assert row.columns()["prompt"] == "Why?"


def test_the_context_may_be_left_out(record: Make) -> None:
    row = DataRecord.model_validate(without(record(inputs__question="Why?"), "inputs__context"))
    assert row.columns()["prompt"] == "Why?"


@given(question=texts, context=texts, answer=texts)
def test_a_prompt_is_the_question_and_under_it_the_context(
    record: Make, question: str, context: str, answer: str
) -> None:
    row = record(inputs__question=question, inputs__context=context, outputs__answer=answer)
    columns = DataRecord.model_validate(row).columns()
    assert columns == {"prompt": f"{question}\n\n{context}", "completion": answer}


@given(values=st.lists(texts, min_size=7, max_size=7), before=blanks, after=blanks)
def test_texts_are_trimmed_and_nothing_else_is_changed(
    record: Make, values: list[str], before: str, after: str
) -> None:
    places = [*TEXTS, "inputs__context"]
    padded = {place: f"{before}{value}{after}" for place, value in zip(places, values, strict=False)}
    plain = {place: value.strip() for place, value in zip(places, values, strict=False)}
    tags = values[5:]
    trimmed = DataRecord.model_validate(record(**padded, meta__tags=[f"{before}{tag}{after}" for tag in tags]))
    assert trimmed.model_dump() == record(**plain, meta__tags=tags)


@given(values=st.lists(texts, min_size=5, max_size=5), tags=st.lists(texts))
def test_a_valid_row_goes_through_a_file_unchanged(
    record: Make, tmp_path_factory: pytest.TempPathFactory, values: list[str], tags: list[str]
) -> None:
    row = record(**dict(zip([*TEXTS, "inputs__context"], values, strict=True)), meta__tags=tags)
    path = tmp_path_factory.getbasetemp() / "records.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (file,) = read_files([path], COMPLETION, NO_CACHE)
    assert file.rows == [DataRecord.model_validate(row).columns()]
    assert DataRecord.model_validate(json.loads(path.read_text(encoding="utf-8"))).model_dump() == row


@pytest.mark.parametrize(
    "timestamp",
    [
        "2026-01-05",
        "2026-01-05T08:11",
        "2026-01-05T08:11:00",
        "2026-01-05T08:11:00Z",
        "2026-01-05T08:11:00.123Z",
        "2026-01-05T08:11:00+05:30",
        "2024-02-29T23:59:59-08:00",
    ],
)
def test_an_iso_8601_time_is_accepted_as_it_is(record: Make, timestamp: str) -> None:
    assert DataRecord.model_validate(record(meta__timestamp=timestamp)).meta.timestamp == timestamp
    assert DataRecord.model_validate(record(meta__timestamp=f" {timestamp}\n")).meta.timestamp == timestamp


@given(
    moment=st.datetimes(min_value=datetime(1000, 1, 1)),
    zone=st.none() | st.integers(-23, 23).map(lambda hours: timezone(timedelta(hours=hours))),
)
def test_what_python_writes_as_iso_8601_is_accepted(record: Make, moment: datetime, zone: timezone | None) -> None:
    timestamp = moment.replace(tzinfo=zone).isoformat()
    assert DataRecord.model_validate(record(meta__timestamp=timestamp)).meta.timestamp == timestamp


@pytest.mark.parametrize(
    "timestamp",
    [
        "",
        "yesterday",
        "1767600000",
        "1767600000.5",
        "05.01.2026",
        "01/05/2026",
        "05-01-2026",
        "2026-13-01",
        "2025-02-29",
        "2026-01-05T25:00:00Z",
        "2026-01-05T08:11:00 and so on",
        "20260105",
        "-123-4",
        "1234-5",
    ],
)
def test_any_other_order_of_a_time_is_refused_with_an_example(record: Make, tmp_path: Path, timestamp: str) -> None:
    told = reasons(record(meta__timestamp=timestamp), tmp_path)
    assert told.startswith("meta.timestamp: ")
    assert "2026-01-05T08:11:00Z" in told


@given(number=st.integers() | st.floats())
def test_a_number_is_no_time(record: Make, number: float) -> None:
    for value in (number, str(number)):
        with pytest.raises(ValidationError):
            DataRecord.model_validate(record(meta__timestamp=value))


def test_keys_of_ones_own_do_no_harm(record: Make) -> None:
    assert DataRecord.model_validate(record(reviewer="me")).columns() == DataRecord.model_validate(record()).columns()
