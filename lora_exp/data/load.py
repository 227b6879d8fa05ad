"""From the data config to checked rows of strings, by split. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lora_exp.config import DataConfig
from lora_exp.data.jsonl import SHOWN, JsonlFile, read_all, reason
from lora_exp.data.kinds import RowKind
from lora_exp.errors import Problem, UserError, count


@dataclass(frozen=True)
class Split:
    """The rows of one split: `prompt` and one string for each answer; and where they come from.

    Args:
        rows: The rows.
        source: What they are called in messages and reports.
        files: The files of this machine that they were read from.
        revision: What `datasets` calls the state of a data set that comes from elsewhere; None for files.
    """

    rows: list[dict[str, str]]
    source: str
    files: tuple[Path, ...] = ()
    revision: str | None = None


def load_splits(config: DataConfig, kind: RowKind) -> dict[str, Split]:
    """Read and check the rows; `train` always, `val` where the config names one.

    Raises:
        UserError: Every bad row of every split, as `file:line: reason`.
    """
    return _from_load_dataset(config, kind) if config.path is not None else _from_files(config, kind)


def _from_files(config: DataConfig, kind: RowKind) -> dict[str, Split]:
    paths = {
        "train": _path(config.train_file, config.splits_dir, kind.train_file),
        "val": _path(config.val_file, config.splits_dir, kind.val_file),
    }
    found = {split: path for split, path in paths.items() if path is not None}
    if "train" not in found:
        raise UserError(
            "there is no training data",
            [Problem("data.splits_dir", "is not set, and neither is data.train_file", "data.splits_dir=my_rows")],
        )
    rows = read_all([JsonlFile[Any](path, kind.file_row) for path in found.values()])
    return {
        split: Split([row.columns() for row in split_rows], _source(path, config.splits_dir), (path,))
        for (split, path), split_rows in zip(found.items(), rows, strict=True)
    }


def _path(file: str | None, splits_dir: str | None, default_name: str) -> Path | None:
    """Resolve a split's file: named outright, or by its usual name in `splits_dir`."""
    if file is None:
        return None if splits_dir is None else _folder(splits_dir) / default_name
    path = Path(file)
    if splits_dir is not None and not path.exists() and (_folder(splits_dir) / path).exists():
        return _folder(splits_dir) / path
    return path


def _folder(splits_dir: str) -> Path:
    """Resolve `pkg://lora_exp.data.sample` (Hydra's notation for a folder inside a package) or a plain path."""
    if splits_dir.startswith("pkg://"):
        package, _, folder = splits_dir.removeprefix("pkg://").rpartition(".")
        try:
            return Path(str(files(package).joinpath(folder)))
        except ModuleNotFoundError as error:
            problem = Problem("data.splits_dir", f"there is no package {package}", "pkg://package.folder, or a path")
            raise UserError("the data cannot be read", [problem]) from error
    return Path(splits_dir)


def _source(path: Path, splits_dir: str | None) -> str:
    """Name a file for reports: rows inside a package by the package, not by where it is installed."""
    inside = splits_dir is not None and splits_dir.startswith("pkg://") and path.parent == _folder(splits_dir)
    return f"{splits_dir}/{path.name}" if inside else str(path)


def _from_load_dataset(config: DataConfig, kind: RowKind) -> dict[str, Split]:
    """Read whatever `datasets.load_dataset` reads, with its columns renamed by `data.columns` (ours to theirs)."""
    names = {"train": config.train_split or "train", "val": config.val_split}
    wanted = {split: name for split, name in names.items() if name is not None}
    splits: dict[str, Split] = {}
    problems = _unknown_columns(config, kind)
    for split, name in wanted.items():
        dataset = _load_dataset(config, name)
        rows, bad = _checked(dataset, config, kind.column_row, f"{config.path}[{name}]")
        local = _local_files(config, name)
        splits[split] = Split(rows, f"{config.path}[{name}]", local, None if local else dataset._fingerprint)
        problems += bad
    if problems:
        shown = problems[:SHOWN]
        if len(problems) > SHOWN:
            shown.append(Problem(str(config.path), f"and {count(len(problems) - SHOWN, 'more bad row')}"))
        raise UserError(f"{count(len(problems), 'row')} of the data cannot be used", shown)
    return splits


def _unknown_columns(config: DataConfig, kind: RowKind) -> list[Problem]:
    ours = list(kind.column_row.model_fields)
    return [
        Problem(f"data.columns.{name}", "is no column of ours", f"ours are {', '.join(ours)}")
        for name in config.columns
        if name not in ours
    ]


def _load_dataset(config: DataConfig, split: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(config.path, config.name, data_files=config.data_files, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = Problem(f"data.path={config.path}", cause, "check data.path, data.name, data.data_files and the splits")
        raise UserError("the data cannot be loaded", [where]) from error
    finally:
        datasets.enable_progress_bars()


def _local_files(config: DataConfig, split: str) -> tuple[Path, ...]:
    """Return the files that a split, `train[:90%]+test` say, was made of, where they lie on this machine."""
    import datasets

    builder = datasets.load_dataset_builder(config.path, config.name, data_files=config.data_files)
    names = {part.partition("[")[0].strip() for part in split.split("+")}
    of_split = [paths for name, paths in (builder.config.data_files or {}).items() if str(name) in names]
    return tuple(path for paths in of_split for path in map(Path, paths) if path.is_file())


def _checked(
    dataset: Any, config: DataConfig, row_type: type[BaseModel], source: str
) -> tuple[list[dict[str, str]], list[Problem]]:
    """Check every row of a dataset; return the good ones and the bad ones' reasons."""
    columns = {ours: config.columns.get(ours, ours) for ours in row_type.model_fields}
    absent = [theirs for theirs in columns.values() if theirs not in dataset.column_names]
    if absent:
        mend = "map ours to theirs: " + " ".join(f"+data.columns.{ours}=..." for ours in columns)
        what = f"has no column {', '.join(absent)}; it has {', '.join(dataset.column_names)}"
        return [], [Problem(source, what, mend)]
    rows, problems = [], []
    for number, row in enumerate(dataset, start=1):
        try:
            checked = row_type.model_validate({ours: row[theirs] for ours, theirs in columns.items()})
        except ValidationError as error:
            problems.append(Problem(f"{source}:{number}", "; ".join(reason(item) for item in error.errors())))
        else:
            rows.append(checked.model_dump())
    return rows, problems
