"""Rows from whatever `datasets.load_dataset` reads: a hub id, a folder, json, csv or parquet files."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from lora_exp.config import DataConfig
from lora_exp.data.formats import RowFormat
from lora_exp.data.jsonl import SHOWN
from lora_exp.data.kinds import OtherRecipeError, RowKind
from lora_exp.data.reasons import reasons
from lora_exp.data.rows import RowDigest, Rows
from lora_exp.data.split import Split
from lora_exp.errors import Problem, UserError, count


def from_load_dataset(config: DataConfig, kind: RowKind) -> dict[str, Split]:
    """Read the splits that the config names, with columns renamed by `data.columns` (ours to theirs), and check them.

    Raises:
        UserError: What cannot be loaded, columns that are not there, and every bad row of every split.
    """
    names = {"train": config.train_split or "train", "val": config.val_split}
    found = [
        _Source(split, f"{config.path}[{name}]", _load_dataset(config, name), config.columns, kind)
        for split, name in names.items()
        if name is not None
    ]
    wrong = _unknown_columns(config, kind) + [problem for source in found for problem in source.wrong_columns()]
    if wrong:
        raise UserError("the columns of the data do not fit", wrong)
    splits = {source.split: _with_origin(source.checked(), config, source.dataset) for source in found}
    bad_rows = sum(source.bad_rows for source in found)
    if bad_rows:
        shown = [problem for source in found for problem in source.problems][:SHOWN]
        if bad_rows > len(shown):
            shown.append(Problem(str(config.path), f"and {count(bad_rows - len(shown), 'more bad row')}"))
        raise UserError(f"{count(bad_rows, 'row')} of the data cannot be used", shown)
    empty = [Problem(source.name, "has no rows") for source in found if not splits[source.split].rows]
    if empty:
        raise UserError("the data cannot be used", empty)
    return splits


def _load_dataset(config: DataConfig, split: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(config.path, config.name, data_files=config.data_files, split=split)
    except (ImportError, OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = Problem(f"data.path={config.path}", cause, "check data.path, data.name, data.data_files and the splits")
        raise UserError("the data cannot be loaded", [where]) from error
    finally:
        datasets.enable_progress_bars()


def _with_origin(split: Split, config: DataConfig, dataset: Any) -> Split:
    """Return a split with the files of this machine that it was made of, or the state of a data set from elsewhere."""
    import datasets

    builder = datasets.load_dataset_builder(config.path, config.name, data_files=config.data_files)
    names = {part.partition("[")[0].strip() for part in str(dataset.split).split("+")}  # of "train[:90%]+test"
    of_split = [paths for name, paths in (builder.config.data_files or {}).items() if str(name) in names]
    local = tuple(path for paths in of_split for path in map(Path, paths) if path.is_file())
    return replace(split, files=local, revision=None if local else dataset._fingerprint)


def _our_columns(kind: RowKind) -> list[str]:
    return list(dict.fromkeys(name for each in kind.formats for name in each.row.model_fields))


def _unknown_columns(config: DataConfig, kind: RowKind) -> list[Problem]:
    ours = _our_columns(kind)
    return [
        Problem(f"data.columns.{name}", "is no column of ours", f"ours are {', '.join(ours)}")
        for name in config.columns
        if name not in ours
    ]


class _Source:
    """One split of a data set.

    Args:
        split: `train` or `val`.
        name: What it is called in messages: `path[split]`.
        dataset: The `datasets.Dataset`.
        columns: Our names to its names.
        kind: The rows that are wanted.
    """

    def __init__(self, split: str, name: str, dataset: Any, columns: dict[str, str], kind: RowKind) -> None:
        self.split, self.name, self.dataset, self.kind = split, name, dataset, kind
        taken = set(columns.values())
        self.columns = {name: name for name in dataset.column_names if name not in taken} | columns
        self.problems: list[Problem] = []
        self.bad_rows = 0

    def wrong_columns(self) -> list[Problem]:
        """Return the columns that are mapped and not there, or without which the rows are of no format."""
        there = self.dataset.column_names
        absent = [theirs for theirs in self.columns.values() if theirs not in there]
        if not absent and len(self.dataset):
            first = next(iter(self._rows()))
            try:
                row_format = self.kind.recognise(first)
            except OtherRecipeError as error:
                return [Problem(self.name, str(error))]
            except ValueError as error:
                return [Problem(self.name, str(error), _mapping(self._likely(first)))]
            absent = [name for name in _required(row_format) if name not in self.columns]
        if not absent:
            return []
        what = f"has no column {', '.join(absent)}; it has {', '.join(there)}"
        return [Problem(self.name, what, _mapping(dict.fromkeys(absent, "...")))]

    def _likely(self, first: dict[str, Any]) -> dict[str, str]:
        """Return a mapping to propose: the only list to a format of one list, if there is one."""
        lists = [name for name, value in first.items() if isinstance(value, list)]
        single = [key for each in self.kind.formats for key in each.row.marks if dict(each.row.marks) == {key: list}]
        if len(lists) == len(single) == 1:
            return {single[0]: lists[0]}
        return dict.fromkeys(["prompt", *self.kind.answers], "...")

    def checked(self) -> Split:
        """Return the rows that are right, on disk, and gather what is wrong with the others."""
        ends, digest, row_format = array("Q"), RowDigest(), None
        with NamedTemporaryFile(prefix="lora_exp-") as file:
            for number, row in enumerate(self._rows(), start=1):
                row_format = row_format or self.kind.recognise(row)
                try:
                    columns = row_format.row.model_validate(row).columns()
                except ValidationError as error:
                    self._bad(number, self.kind.stranger(row, row_format) or reasons(error))
                    continue
                as_json = to_json(columns, inf_nan_mode="constants")
                digest.add(as_json, 1)
                file.write(as_json)
                ends.append(file.tell())
            file.flush()
            rows = Rows.mapped(Path(file.name), ends, digest.name) if ends else Rows(b"", ends, digest.name)
        return Split(rows, self.name, row_format.name if row_format else "")

    def _rows(self) -> Iterator[dict[str, Any]]:
        features = self.dataset.features
        for row in self.dataset:
            yield {ours: _without_nulls(row[theirs], features[theirs]) for ours, theirs in self.columns.items()}

    def _bad(self, number: int, what: str) -> None:
        self.bad_rows += 1
        if len(self.problems) < SHOWN:
            self.problems.append(Problem(f"{self.name}:{number}", what))


def _without_nulls(value: Any, feature: Any) -> Any:
    """Leave out the keys of an object that are null because another row's object has them.

    Arrow gives all objects of a column the same keys: the arguments of one tool those of every other. Columns that keep
    JSON as it was written (`datasets.Json`) are left as they are.
    """
    inner = getattr(feature, "feature", None)  # of a datasets.List
    if isinstance(value, dict) and isinstance(feature, dict):
        present = {key: each for key, each in value.items() if each is not None}
        return {key: _without_nulls(each, feature[key]) for key, each in present.items()}
    if isinstance(value, list) and inner is not None:
        return [_without_nulls(each, inner) for each in value]
    return value


def _required(row_format: RowFormat) -> list[str]:
    return [name for name, field in row_format.row.model_fields.items() if field.is_required()]


def _mapping(columns: dict[str, str]) -> str:
    pairs = (f"+data.columns.{ours}={theirs}" for ours, theirs in columns.items())
    return f"map ours to theirs: {' '.join(pairs)}"
