"""What a result was made of: versions, git, data, base. `run.json` keeps it, and `lora_exp.reproduce` compares it."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_exp.data.split import Split

PACKAGES = (
    "lora_exp",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "hydra-core",
)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Return the commit of the working folder's repository, and whether and by what files differ from it.

    `changes` is a digest of the difference in tracked files; None where there is none.
    """
    try:
        commit, status, changes = (
            subprocess.run(["git", *command], capture_output=True, check=True, timeout=5).stdout  # noqa: S603, S607
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"], ["diff", "HEAD", "--binary"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    digest = hashlib.sha256(changes).hexdigest() if changes else None
    return {"commit": commit.decode().strip(), "dirty": bool(status.strip()), "changes": digest}


def data_facts(splits: Mapping[str, Split]) -> dict[str, dict[str, Any]]:
    """Return where the rows of each split come from: the sha256 of its files, or what the hub calls its state."""
    return {
        name: {
            "source": split.source,
            "sha256": {_file_name(split, file): sha256(file) for file in split.files},
            "revision": split.revision,
        }
        for name, split in splits.items()
    }


def _file_name(split: Split, file: Path) -> str:
    """Name a file inside a package by the package, not by where it is installed."""
    return split.source if split.source.startswith("pkg://") else str(file)


def data_file(name: str) -> Path:
    """Return the file that `data_facts` names so, whether or not it is there."""
    if not name.startswith("pkg://"):
        return Path(name)
    package, _, file = name.removeprefix("pkg://").partition("/")
    return Path(str(files(package).joinpath(file)))


def adapter_facts(start: Path | None) -> dict[str, Any] | None:
    """Return the sha256 of the adapter that a run goes on from; None for a new one."""
    if start is None:
        return None
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {"folder": str(start), "sha256": {name: sha256(start / name) for name in names}}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file: a gigabyte takes a second or two."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
