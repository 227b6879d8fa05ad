"""From the data config to checked rows of strings, by split. Never imports torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lora_exp.config import DataConfig
from lora_exp.data.hub import from_load_dataset
from lora_exp.data.jsonl import JsonlFile, read_all
from lora_exp.data.kinds import RowKind
from lora_exp.data.split import Split
from lora_exp.errors import Problem, UserError


def load_splits(config: DataConfig, kind: RowKind) -> dict[str, Split]:
    """Read and check the rows; `train` always, `val` where the config names one.

    Raises:
        UserError: Every bad row of every split, as `file:line: reason`.
    """
    return from_load_dataset(config, kind) if config.path is not None else _from_files(config, kind)


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
    read = [JsonlFile(path, kind) for path in found.values()]
    return {
        split: Split([row.columns() for row in rows], _source(path, config.splits_dir), _format_of(file))
        for (split, path), file, rows in zip(found.items(), read, read_all(read), strict=True)
    }


def _format_of(file: JsonlFile) -> str:
    assert file.format is not None, "a file that was read without problems has rows"
    return file.format.name


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
