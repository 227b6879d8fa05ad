"""The user's own files that libraries read. A run needs none: one that cannot be read is left out."""

from __future__ import annotations

import errno
import netrc
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")

NETRC = "NETRC"
TOKEN = "HF_TOKEN_PATH"  # noqa: S105 - the name of a variable
WANDB, WANDB_HERE = "WANDB_CONFIG_DIR", "WANDB_DIR"
"""The variables that name the files to libraries: requests, pip and W&B; huggingface_hub; W&B, for its settings of the
user and of the working folder."""


def netrc_passwords() -> dict[str, str]:
    """Return the password of each host in netrc; that of all others is `default`'s."""
    return _look_at(netrc_file(), _read_netrc)[0] or {}


def hub_token() -> str:
    """Return the Hugging Face token that `hf auth login` wrote; empty where there is none."""
    return (_look_at(token_file(), _read_text)[0] or "").strip()


def hide_unreadable_files() -> list[str]:
    """Hide the files that cannot be read from libraries, of this process and its children, and return a note of each.

    The libraries would raise where they look at them: requests and W&B UnicodeDecodeError, huggingface_hub any OSError.
    """
    looked_at = (
        (NETRC, netrc_file(), _read_netrc),
        (TOKEN, token_file(), _read_text),
        (WANDB, wandb_settings(), _read_text),
        (WANDB_HERE, wandb_settings_here(), _read_text),
    )
    notes = []
    for variable, file, read in looked_at:
        note = _look_at(file, read)[1]
        if note:
            os.environ[variable] = os.devnull
        if note and os.path.lexists(file):  # not of a home folder that this user may not enter
            notes.append(note)
    return notes


def netrc_file() -> Path:
    """Return the file that requests and W&B read, whether or not it is there."""
    if given := os.environ.get(NETRC):
        return _expanded(given)
    files = [_expanded("~/.netrc"), _expanded("~/_netrc")]
    return next((file for file in files if os.path.lexists(file)), files[0])


def token_file() -> Path:
    """Return the file that huggingface_hub reads (`constants.py` of 2.4), whether or not it is there."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return _expanded(os.environ.get(TOKEN) or f"{home}/token")


def wandb_settings() -> Path:
    """Return W&B's settings of the user (`sdk/wandb_setup.py` of 0.31), whether or not they are there."""
    return _expanded(os.environ.get(WANDB) or "~/.config/wandb") / "settings"


def wandb_settings_here() -> Path:
    """Return W&B's settings of the working folder (`sdk/wandb_setup.py` of 0.31), whether or not they are there.

    They are read before WANDB_DIR is looked at. Once hidden they are the empty file.
    """
    if os.environ.get(WANDB_HERE) == os.devnull:
        return Path(os.devnull)
    return Path(".wandb" if os.path.exists(".wandb") else "wandb") / "settings"  # noqa: PTH110 - raises nothing


def _expanded(path: str) -> Path:
    """Expand `~` and variables; `Path.expanduser` raises for a user without a home folder."""
    return Path(os.path.expandvars(os.path.expanduser(path)))  # noqa: PTH111


def _read_netrc(file: Path) -> dict[str, str]:
    hosts = netrc.netrc(str(file)).hosts  # named, as libraries name it: of its own file netrc also checks the owner
    return {host: password or "" for host, (_, _, password) in hosts.items()}


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _look_at(file: Path, read: Callable[[Path], Found]) -> tuple[Found | None, str]:
    """Return what is in a file, or a note that says why it is left out; neither where there is no file."""
    try:
        _require_no_pipe(file)
        return read(file), ""
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except UnicodeDecodeError:
        why = f"it is not UTF-8 text (line {_undecodable_line(file)})"
    except netrc.NetrcParseError as error:  # whose message may repeat a part of a password
        why = f"it is not in netrc's format (near line {error.lineno})"
    except OSError as error:
        why = f"it cannot be read: {error.strerror}"
    return None, f"{_short(file)} is left out: {why}"


def _require_no_pipe(file: Path) -> None:
    """Check that reading ends: of a pipe, a socket or a terminal it may not.

    Raises:
        OSError: If it is one, or there is no such file.
    """
    mode = file.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or file.samefile(os.devnull)):
        raise OSError(errno.EINVAL, "Not a regular file")


def _undecodable_line(file: Path) -> int:
    """Return the number of the first line that is not UTF-8: the error knows its place in a block only."""
    lines = file.read_bytes().split(b"\n")
    return next(number for number, line in enumerate(lines, 1) if "\ufffd" in line.decode("utf-8", "replace"))


def _short(file: Path) -> str:
    home = _expanded("~")
    return str("~" / file.relative_to(home)) if file.is_relative_to(home) else str(file)
