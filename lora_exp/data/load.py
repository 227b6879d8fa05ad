"""From the data config to checked rows of strings, by split. Never imports torch."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from lora_exp.config import DataConfig
from lora_exp.data.cache import data_cache
from lora_exp.data.check import Looked, look_at_rows
from lora_exp.data.duplicates import LEAKS, Finding, leak_findings, shared_rows
from lora_exp.data.files import with_any_suffix
from lora_exp.data.findings import findings_of
from lora_exp.data.hub import from_load_dataset
from lora_exp.data.jsonl import SHOWN
from lora_exp.data.kinds import RowKind
from lora_exp.data.read import read_files
from lora_exp.data.split import Split
from lora_exp.errors import Problem, UserError, count


def load_splits(config: DataConfig, kind: RowKind) -> dict[str, Split]:
    """Read and check the rows; `train` always, `val` where the config names one.

    Raises:
        UserError: Every bad row of every split, as `file:line: reason`; rows of both, if the config calls it an error.
    """
    if config.path is not None:
        return _looked_at(from_load_dataset(config, kind), config, kind)
    return _from_files(config, kind)


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
    read = read_files(list(found.values()), kind, data_cache(config.cache_size))
    findings = _findings([file.looked for file in read], config)
    return {
        split: Split(file.rows, _source(file.path, config.splits_dir), file.format, findings, (file.path,))
        for split, file, findings in zip(found, read, findings, strict=True)
    }


def _looked_at(splits: dict[str, Split], config: DataConfig, kind: RowKind) -> dict[str, Split]:
    findings = _findings([look_at_rows(split.rows, split.source, kind) for split in splits.values()], config)
    return {name: replace(split, findings=found) for (name, split), found in zip(splits.items(), findings, strict=True)}


def _findings(read: list[Looked], config: DataConfig) -> list[tuple[Finding, ...]]:
    """Return what to tell of `train` and, where it is there, of `val`.

    Raises:
        UserError: The rows of `val` that `train` has too, if the config calls them an error.
    """
    found = [findings_of(each) for each in read]
    if len(read) > 1 and config.on_leak != "ignore":
        train, val = read
        found[1] += _leak(train, val, config)
    return [tuple(each) for each in found]


def _leak(train: Looked, val: Looked, config: DataConfig) -> list[Finding]:
    pairs = shared_rows(train, val)
    leaks = [pair for pair in pairs if pair.how in LEAKS]
    if leaks and config.on_leak == "error":
        same = {"exact": "is the same row as", "near": "is, but for case, spaces and punctuation, the same row as"}
        problems = [Problem(pair.val, f"{same[pair.how]} {pair.train}") for pair in leaks[:SHOWN]]
        if len(leaks) > SHOWN:
            problems.append(Problem(val.source, f"and {count(len(leaks) - SHOWN, 'more row')} of train"))
        problems[-1] = replace(problems[-1], mend="take them out of one of the two, or data.on_leak=warn")
        raise UserError(f"{count(len(leaks), 'row')} of val cannot be evaluated on: they are trained on", problems)
    return leak_findings(pairs)


def _path(file: str | None, splits_dir: str | None, default_name: str) -> Path | None:
    """Resolve a split's file: named outright, or by its usual name in `splits_dir`."""
    if file is None:
        return None if splits_dir is None else with_any_suffix(_folder(splits_dir) / default_name)
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
