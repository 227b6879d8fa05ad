"""Rows of every format come through `datasets.load_dataset` as they come from files of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_exp.config import DataConfig
from lora_exp.data.kinds import COMPLETION, PREFERENCE, RowKind
from lora_exp.data.load import load_splits
from lora_exp.data.rows import Rows
from lora_exp.data.split import Split
from lora_exp.errors import Problem, UserError
from tests.rows import EXAMPLES, Example, Json, assistant, call, says, system, tool, user

examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda each: each.name)
Read = Callable[..., Split]

CALLING = [
    {
        "messages": [user("Rain?"), assistant("", tool_calls=[call("rain", city="Oslo")]), says("tool", "wet")],
        "tools": [tool("rain")],
    },
    {
        "messages": [system("Be short."), user("Sum?"), assistant("", tool_calls=[call("sum", first=1, second=2)])],
        "tools": [
            {
                "type": "function",
                "function": {"name": "sum", "parameters": {"type": "object", "properties": {"first": {"type": "int"}}}},
            }
        ],
    },
]
"""Calls of two tools, whose arguments and schemas have no key in common."""
CALLING = [{**row, "messages": [*row["messages"], assistant("Done.")]} for row in CALLING]


def write(rows: list[Json], path: Path) -> None:
    import datasets

    if path.suffix == ".json":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Write rows as a file that `load_dataset` reads, and read them so."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def run(rows: list[Json], kind: RowKind, builder: str = "json", **keys: Any) -> Split:
        path = tmp_path / f"rows.{builder}"
        write(rows, path)
        return load_splits(DataConfig(path=builder, data_files={"train": str(path)}, **keys), kind)["train"]

    return run


def refusal(read: Read, *arguments: Any, **keys: Any) -> Problem:
    with pytest.raises(UserError) as caught:
        read(*arguments, **keys)
    (problem,) = caught.value.problems
    return problem


def columns(example: Example, row: Json) -> Json:
    return example.kind.recognise(row).row.model_validate(row).columns()


@examples
@pytest.mark.parametrize("builder", ["json", "parquet"])
def test_a_row_of_any_format_is_recognised_and_means_the_same(example: Example, builder: str, read: Read) -> None:
    split = read([example.row] * 2, example.kind, builder)
    assert split.format == example.name
    assert list(split.rows) == [columns(example, example.row)] * 2


@pytest.mark.parametrize("builder", ["json", "parquet"])
def test_a_tools_arguments_are_its_own(builder: str, read: Read) -> None:
    """A column of Arrow has one set of keys for all rows; no call is given another one's, as nulls."""
    split = read(CALLING, COMPLETION, builder)
    assert [json.loads(json.dumps(row)) for row in split.rows] == CALLING


@pytest.mark.parametrize(("kind", "name"), [(COMPLETION, "prompt-completion"), (PREFERENCE, "preference")])
def test_rows_of_strings_come_from_csv(kind: RowKind, name: str, read: Read) -> None:
    row = {"prompt": "Where?", **{answer: f"{answer}, they say" for answer in kind.answers}}
    split = read([{**row, "id": 7}], kind, "csv")
    assert (split.format, list(split.rows)) == (name, [row])


@pytest.mark.parametrize(
    ("example", "theirs"),
    [
        (EXAMPLES[3], {"messages": "conversation"}),
        (EXAMPLES[2], {"prompt": "asked", "completion": "told"}),
        (EXAMPLES[1], {"prompt": "completion", "completion": "prompt"}),
        (EXAMPLES[4], {"instruction": "question", "input": "about", "output": "answer"}),
        (EXAMPLES[6], {"chosen": "good", "rejected": "bad"}),
        (EXAMPLES[7], {"chosen": "good", "rejected": "bad"}),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_columns_of_any_format_are_mapped(example: Example, theirs: dict[str, str], read: Read) -> None:
    row = {theirs.get(key, key): value for key, value in example.row.items()}
    split = read([row], example.kind, columns=theirs)
    assert (split.format, list(split.rows)) == (example.name, [columns(example, example.row)])


def test_what_is_mapped_is_not_also_what_it_was_called(read: Read) -> None:
    """`messages` is told to be the prompt, so the rows are no conversations."""
    rows = [{"messages": [user("Where?")], "answer": [assistant("There.")]}]
    split = read(rows, COMPLETION, columns={"prompt": "messages", "completion": "answer"})
    assert split.format == "prompt-completion messages"


def test_a_data_set_of_the_other_recipes_rows_names_that_recipe(read: Read) -> None:
    problem = refusal(read, [EXAMPLES[5].row], COMPLETION)
    assert problem == Problem("json[train]", "looks like a preference row: recipe=dpo")


def test_columns_of_no_format_are_told_with_how_to_map_them(read: Read) -> None:
    problem = refusal(read, [{"question": "Where?", "answer": "There."}], COMPLETION)
    assert problem.what.startswith("has question, answer, which is no row of these formats: ")
    assert problem.mend == "map ours to theirs: +data.columns.prompt=... +data.columns.completion=..."


def test_a_conversation_under_another_name_is_told_with_the_mapping(read: Read) -> None:
    problem = refusal(read, [{"id": "1", "conversation": EXAMPLES[3].row["messages"]}], COMPLETION)
    assert problem.mend == "map ours to theirs: +data.columns.messages=conversation"


def test_a_mapped_column_that_is_not_there_is_told_with_those_that_are(read: Read) -> None:
    problem = refusal(read, [EXAMPLES[3].row], COMPLETION, columns={"messages": "conversation"})
    assert problem.what == "has no column conversation; it has messages"


def test_two_formats_in_a_data_set_are_told_with_the_row(read: Read) -> None:
    rows = [{"prompt": "Where?", "completion": "There.", "messages": None}, {"prompt": None, **EXAMPLES[3].row}]
    problem = refusal(read, rows, COMPLETION)
    assert (problem.where, problem.what) == (
        "json[train]:2",
        "is a messages row, the file began with prompt-completion rows",
    )


def test_rows_that_are_held_on_disk_are_found_by_their_number(read: Read) -> None:
    rows = [{"prompt": f"question {number}", "completion": "x" * 1000} for number in range(2000)]
    split = read(rows, COMPLETION, "parquet")
    assert len(split.rows) == len(rows)
    assert split.rows[-1] == rows[-1]
    assert isinstance(split.rows, Rows)
    assert split.rows == rows
