"""From the data config to checked rows, wherever they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from lora_exp.config import DataConfig
from lora_exp.data.jsonl import SHOWN
from lora_exp.data.kinds import COMPLETION, PREFERENCE, RowKind
from lora_exp.data.load import load_splits
from lora_exp.errors import UserError

Make = Callable[..., dict[str, Any]]
Write = Callable[..., Path]


def refusal(config: DataConfig, kind: RowKind = PREFERENCE) -> UserError:
    with pytest.raises(UserError) as caught:
        load_splits(config, kind)
    assert caught.value.problems
    return caught.value


def prompts(config: DataConfig, split: str = "train") -> list[str]:
    return [row["prompt"] for row in load_splits(config, PREFERENCE)[split].rows]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Files.


@pytest.mark.parametrize("kind", [COMPLETION, PREFERENCE], ids=["completion", "preference"])
def test_a_folder_of_splits_is_read_by_the_usual_names(
    tmp_path: Path, write_jsonl: Write, record: Make, preference: Make, kind: RowKind
) -> None:
    make = record if kind is COMPLETION else preference
    write_jsonl(tmp_path / kind.train_file, [make(id="a"), make(id="b")])
    write_jsonl(tmp_path / kind.val_file, [make(id="c")])
    splits = load_splits(DataConfig(splits_dir=str(tmp_path)), kind)
    assert {name: len(split.rows) for name, split in splits.items()} == {"train": 2, "val": 1}
    assert {name: split.source for name, split in splits.items()} == {
        "train": str(tmp_path / kind.train_file),
        "val": str(tmp_path / kind.val_file),
    }
    assert all(set(row) == {"prompt", *kind.answers} for split in splits.values() for row in split.rows)


def test_files_can_be_named_outright(here: Path, write_jsonl: Write, preference: Make) -> None:
    write_jsonl(here / "mine.jsonl", [preference(prompt="mine")])
    write_jsonl(here / "yours.jsonl", [preference(prompt="yours")])
    config = DataConfig(train_file="mine.jsonl", val_file=str(here / "yours.jsonl"))
    assert prompts(config) == ["mine"]
    assert prompts(config, "val") == ["yours"]


def test_a_named_file_replaces_the_usual_one_of_its_split_only(
    tmp_path: Path, write_jsonl: Write, preference: Make
) -> None:
    write_jsonl(tmp_path / "train.dpo.jsonl", [preference(prompt="usual")])
    write_jsonl(tmp_path / "val.dpo.jsonl", [preference(prompt="usual")])
    other = write_jsonl(tmp_path / "other.jsonl", [preference(prompt="other")])
    config = DataConfig(splits_dir=str(tmp_path), train_file=str(other))
    assert (prompts(config), prompts(config, "val")) == (["other"], ["usual"])


def test_a_named_file_is_looked_for_in_the_working_folder_first_and_then_in_splits_dir(
    here: Path, write_jsonl: Write, preference: Make
) -> None:
    (here / "splits").mkdir()
    write_jsonl(here / "splits" / "mine.jsonl", [preference(prompt="in splits_dir")])
    config = DataConfig(splits_dir="splits", train_file="mine.jsonl", val_file="mine.jsonl")
    assert prompts(config) == ["in splits_dir"]
    write_jsonl(here / "mine.jsonl", [preference(prompt="in the working folder")])
    assert prompts(config) == ["in the working folder"]


def test_without_a_validation_file_there_is_no_validation_split(
    tmp_path: Path, write_jsonl: Write, preference: Make
) -> None:
    train = write_jsonl(tmp_path / "mine.jsonl", [preference()])
    assert set(load_splits(DataConfig(train_file=str(train)), PREFERENCE)) == {"train"}


def test_no_file_at_all_is_told_with_the_key_to_set() -> None:
    (problem,) = refusal(DataConfig()).problems
    assert problem.where == "data.splits_dir"
    assert "data.splits_dir=" in problem.mend


def test_validation_rows_alone_are_not_enough(tmp_path: Path, write_jsonl: Write, preference: Make) -> None:
    val = write_jsonl(tmp_path / "val.jsonl", [preference()])
    assert "training" in refusal(DataConfig(val_file=str(val))).title


@pytest.mark.parametrize("kind", [COMPLETION, PREFERENCE], ids=["completion", "preference"])
def test_a_folder_inside_a_package_is_read_from_there(kind: RowKind) -> None:
    splits = load_splits(DataConfig(splits_dir="pkg://lora_exp.data.sample"), kind)
    folder = Path(str(files("lora_exp.data").joinpath("sample")))
    assert splits["train"].source == f"pkg://lora_exp.data.sample/{kind.train_file}", "not where it is installed"
    plain = load_splits(DataConfig(splits_dir=str(folder)), kind)
    assert {split: each.rows for split, each in splits.items()} == {split: each.rows for split, each in plain.items()}


def test_a_package_that_is_not_there_is_told() -> None:
    assert "no_such_package" in str(refusal(DataConfig(splits_dir="pkg://no_such_package.rows")))


def test_a_missing_file_names_its_neighbours(tmp_path: Path, write_jsonl: Write, record: Make) -> None:
    write_jsonl(tmp_path / "train.jsonl", [record()])
    write_jsonl(tmp_path / "val.jsonl", [record()])
    error = refusal(DataConfig(splits_dir=str(tmp_path)), PREFERENCE)
    assert [problem.where for problem in error.problems] == [
        str(tmp_path / "train.dpo.jsonl"),
        str(tmp_path / "val.dpo.jsonl"),
    ]
    assert all("train.jsonl, val.jsonl" in problem.mend for problem in error.problems)


def test_bad_lines_of_both_splits_are_told_at_once(tmp_path: Path, write_jsonl: Write, preference: Make) -> None:
    train = write_jsonl(tmp_path / "train.dpo.jsonl", [preference(), preference(chosen="")])
    val = write_jsonl(tmp_path / "val.dpo.jsonl", ["{"])
    error = refusal(DataConfig(splits_dir=str(tmp_path)))
    assert [problem.where for problem in error.problems] == [f"{train}:2", f"{val}:1"]


def test_half_a_surrogate_pair_is_a_bad_line_of_either_kind(tmp_path: Path, write_jsonl: Write, record: Make) -> None:
    """Such a text cannot be written as UTF-8, so that no tokenizer takes it."""
    line = r'{"prompt": "p", "chosen": "\ud83d", "rejected": "r"}'
    train = write_jsonl(tmp_path / "pairs.jsonl", [line])
    assert refusal(DataConfig(train_file=str(train))).problems[0].where == f"{train}:1"
    train = write_jsonl(tmp_path / "records.jsonl", [json.dumps(record(outputs__answer="half \ud83d"))])
    assert refusal(DataConfig(train_file=str(train)), COMPLETION).problems[0].where == f"{train}:1"


# Whatever datasets.load_dataset reads.


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_jsonl: Write) -> Callable[..., DataConfig]:
    """Return a function that writes rows and gives the config that reads them through `load_dataset`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(train: list[Any], val: list[Any] | None = None, **keys: Any) -> DataConfig:
        data_files = {"train": str(write_jsonl(tmp_path / "a.jsonl", train))}
        if val is not None:
            data_files["test"] = str(write_jsonl(tmp_path / "b.jsonl", val))
        return DataConfig(path="json", data_files=data_files, val_split="test" if val else None, **keys)

    return make


def test_json_files_are_read_through_load_dataset(source: Callable[..., DataConfig], preference: Make) -> None:
    splits = load_splits(
        source([preference(), preference(prompt="b")], [preference()], train_split="train"), PREFERENCE
    )
    assert {name: len(split.rows) for name, split in splits.items()} == {"train": 2, "val": 1}
    assert splits["train"].rows[1] == preference(prompt="b")


def test_columns_map_our_names_to_theirs(source: Callable[..., DataConfig]) -> None:
    rows = [{"ask": " what?", "good": "yes ", "rejected": "no", "id": 3}]
    splits = load_splits(source(rows, columns={"prompt": "ask", "chosen": "good"}), PREFERENCE)
    assert splits["train"].rows == [{"prompt": " what?", "chosen": "yes ", "rejected": "no"}]


def test_completion_rows_come_as_prompt_and_completion(source: Callable[..., DataConfig]) -> None:
    rows = [{"prompt": "what?", "answer": "this"}]
    splits = load_splits(source(rows, columns={"completion": "answer"}), COMPLETION)
    assert splits["train"].rows == [{"prompt": "what?", "completion": "this"}]


def test_a_part_of_a_split_can_be_named(source: Callable[..., DataConfig], preference: Make) -> None:
    rows = [preference(prompt=str(number)) for number in range(10)]
    assert prompts(source(rows, train_split="train[:30%]")) == ["0", "1", "2"]


def test_a_column_that_is_not_there_is_told_with_those_that_are(
    source: Callable[..., DataConfig], preference: Make
) -> None:
    (problem,) = refusal(source([{"ask": "a", "chosen": "b", "rejected": "c"}])).problems
    assert "has no column prompt" in problem.what
    assert "ask" in problem.what
    assert "+data.columns.prompt=" in problem.mend


def test_bad_rows_of_all_splits_are_told_by_split_and_row(source: Callable[..., DataConfig], preference: Make) -> None:
    error = refusal(source([preference(), preference(chosen=" ")], [preference(prompt="")]))
    assert [(problem.where, problem.what) for problem in error.problems] == [
        ("json[train]:2", "chosen: is empty"),
        ("json[test]:1", "prompt: is empty"),
    ]


def test_the_first_bad_rows_are_named_and_the_rest_counted(source: Callable[..., DataConfig], preference: Make) -> None:
    error = refusal(source([preference(chosen="")] * (SHOWN + 3)))
    assert len(error.problems) == SHOWN + 1
    assert "3 more bad rows" in error.problems[-1].what
    assert error.title.startswith(f"{SHOWN + 3} rows")


def test_a_source_without_rows_is_refused(source: Callable[..., DataConfig], preference: Make) -> None:
    assert refusal(source([preference()], train_split="train[:0]"))


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "no_such_folder/rows"},
        {"train_split": "training"},
        {"data_files": {"train": "no_such_file.jsonl"}},
        {"columns": {"promt": "prompt"}},
    ],
    ids=["path", "split", "file", "column"],
)
def test_what_load_dataset_cannot_find_is_a_user_error(
    source: Callable[..., DataConfig], preference: Make, changes: dict[str, Any]
) -> None:
    config = source([preference()]).model_copy(update=changes)
    error = refusal(config)
    assert next(iter(error.problems)).mend


def test_a_file_that_load_dataset_cannot_parse_is_a_user_error(source: Callable[..., DataConfig]) -> None:
    assert refusal(source(["{not json"]))


# The command itself.


@pytest.mark.parametrize(
    ("lines", "said"),
    [(['{"prompt": 1}', "nonsense"], "mine.jsonl:2: not JSON"), (None, "there is no such file")],
    ids=["bad lines", "no file"],
)
def test_a_data_error_ends_with_status_2_and_no_traceback_before_torch_is_imported(
    command: Callable[..., Any], tmp_path: Path, write_jsonl: Write, lines: list[str] | None, said: str
) -> None:
    if lines is not None:
        write_jsonl(tmp_path / "mine.jsonl", lines)
    done = command(
        "recipe=dpo",
        "data=splits",
        "data.train_file=mine.jsonl",
        "trainer.eval_strategy=no",
        "tracker=none",
        "output_dir=run",
    )
    assert done.status == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not done.heavy_imports
    assert (tmp_path / "run" / "run.json").is_file()
