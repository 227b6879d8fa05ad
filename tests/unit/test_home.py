"""Files of the home folder that libraries read: what is in them is masked; one that cannot be read is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora_exp.secrets import masking
from lora_exp.secrets.home import hide_unreadable_files, hub_token, netrc_passwords, wandb_settings, wandb_settings_here
from lora_exp.secrets.masking import masked
from lora_exp.tracking.wandb import logged_in

KEY = "0123456789abcdef" * 2 + "01234567"
GOOD = f"machine api.wandb.ai login user password {KEY}\n"
VARIABLES = (
    "NETRC",
    "HF_TOKEN_PATH",
    "HF_HOME",
    "XDG_CACHE_HOME",
    "WANDB_CONFIG_DIR",
    "WANDB_DIR",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
)
TOKEN = ".cache/huggingface/token"
SETTINGS = ".config/wandb/settings"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder with nothing in it."""
    monkeypatch.setattr(os, "environ", {**os.environ, "HOME": str(tmp_path)})
    for name in VARIABLES:
        os.environ.pop(name, None)
    masking._stored.cache_clear()
    yield tmp_path
    masking._stored.cache_clear()


def write(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        (".netrc", b"machine a\n\npassword caf\xe9\n", "~/.netrc is left out: it is not UTF-8 text (line 3)"),
        (".netrc", GOOD.encode("utf-16"), "~/.netrc is left out: it is not UTF-8 text (line 1)"),
        (
            ".netrc",
            b"machine a\npassword my secret\nx\n",
            "~/.netrc is left out: it is not in netrc's format (near line 3)",
        ),
        (".netrc", None, "~/.netrc is left out: it cannot be read: Is a directory"),
        ("_netrc", b"\xff", "~/_netrc is left out: it is not UTF-8 text (line 1)"),
        (TOKEN, b"hf_\xe9", f"~/{TOKEN} is left out: it is not UTF-8 text (line 1)"),
        (TOKEN, None, f"~/{TOKEN} is left out: it cannot be read: Is a directory"),
        (SETTINGS, b"[default]\nentity = \xe9", f"~/{SETTINGS} is left out: it is not UTF-8 text (line 2)"),
    ],
)
def test_a_file_that_cannot_be_read_is_left_out_with_one_note(
    home: Path, name: str, content: bytes | None, note: str
) -> None:
    (home / name).mkdir(parents=True) if content is None else write(home / name, content)
    assert masked(f"{KEY} stays") == f"{KEY} stays"
    assert not logged_in()
    assert hide_unreadable_files() == [note]
    assert hide_unreadable_files() == [], "a second time in the process, or in a child, there is nothing to say"
    assert (netrc_passwords(), hub_token()) == ({}, "")


def test_a_home_folder_that_one_may_not_enter_is_nothing_to_speak_of(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `HOME=/root` for another user. Root may enter any, so what the system would answer is set here."""
    closed = PermissionError(13, "Permission denied")

    def refuse(*_: object, **__: object) -> None:
        raise closed

    for name in ("builtins.open", "io.open", "os.stat", "os.lstat"):
        monkeypatch.setattr(name, refuse)
    assert (netrc_passwords(), hub_token(), hide_unreadable_files()) == ({}, "", [])
    assert {os.environ[name] for name in ("NETRC", "HF_TOKEN_PATH", "WANDB_CONFIG_DIR")} == {os.devnull}


def test_a_link_that_leads_to_itself_is_left_out(home: Path) -> None:
    (home / ".netrc").symlink_to(home / ".netrc")
    assert hide_unreadable_files() == ["~/.netrc is left out: it cannot be read: Too many levels of symbolic links"]


@pytest.mark.parametrize("where", ["empty", "dangling link", "no folder", "below a file", "another user's"])
def test_files_that_are_not_there_are_nothing_to_speak_of(home: Path, where: str) -> None:
    if where == "dangling link":
        (home / ".netrc").symlink_to(home / "nowhere")
    elif where == "no folder":
        os.environ["HOME"] = str(home / "nowhere")
    elif where == "below a file":
        os.environ["HOME"] = str(write(home / "file", b""))
    elif where == "another user's":
        os.environ.update(NETRC="~nobody-of-that-name/.netrc", HF_HOME="~nobody-of-that-name")
    assert hide_unreadable_files() == []
    assert (netrc_passwords(), hub_token(), logged_in()) == ({}, "", False)


def test_a_user_without_a_home_folder_is_no_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del os.environ["HOME"]
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # as in a container that runs as a number
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    assert masked("a text") == "a text"
    assert hide_unreadable_files() == []


@pytest.mark.parametrize("name", [".netrc", TOKEN, SETTINGS])
def test_a_pipe_is_not_waited_for(home: Path, name: str) -> None:
    (home / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(home / name)
    assert hide_unreadable_files() == [f"~/{name} is left out: it cannot be read: Not a regular file"]
    assert (netrc_passwords(), hub_token()) == ({}, "")


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
def test_settings_of_wandb_in_the_working_folder_are_left_out_too(
    home: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(home)
    write(home / folder / "settings", b"[default]\nentity = \xe9")
    assert hide_unreadable_files() == [f"{folder}/settings is left out: it is not UTF-8 text (line 2)"]
    assert wandb_settings_here().read_text() == ""
    assert hide_unreadable_files() == [], "said once"


@given(content=st.binary() | st.text().map(str.encode))
@example(b'machine "a\\')
@example(b"machine a login \x00 password")
@example(b"macdef x\n")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_in_the_files_no_library_fails_on_them(home: Path, content: bytes) -> None:
    from requests.utils import get_netrc_auth
    from wandb.sdk.lib.settings_file import SettingsFiles
    from wandb.sdk.lib.wbauth import read_netrc_auth

    for name in VARIABLES:
        os.environ.pop(name, None)
    for name in (".netrc", TOKEN, SETTINGS):
        write(home / name, content)
    notes = hide_unreadable_files()
    assert len(notes) == len({note.split()[0] for note in notes})
    get_netrc_auth("https://api.wandb.ai")
    read_netrc_auth(host="https://api.wandb.ai")
    SettingsFiles(global_settings=wandb_settings(), local_settings=home / "none")
    Path(os.environ.get("HF_TOKEN_PATH") or home / TOKEN).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [".netrc", "_netrc", "elsewhere"])
@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_what_libraries_find_is_masked_whoever_else_may_read_it(home: Path, name: str, mode: int) -> None:
    from requests.utils import get_netrc_auth

    write(home / name, GOOD.encode()).chmod(mode)
    write(home / ".xdg" / "huggingface" / "token", b"an-odd-token-of-the-hub\n")
    os.environ["XDG_CACHE_HOME"] = str(home / ".xdg")
    if name == "elsewhere":
        os.environ["NETRC"] = "~/elsewhere"
    assert get_netrc_auth("https://api.wandb.ai") == ("user", KEY)
    assert masked(f"{KEY}, an-odd-token-of-the-hub") == "***, ***"
    assert logged_in()
    assert hide_unreadable_files() == []


@pytest.mark.parametrize(
    ("content", "url", "known"),
    [
        (GOOD, None, True),
        (GOOD, "https://wandb.example.com:8080", False),
        (f"machine wandb.example.com:8080 login user password {KEY}", "https://wandb.example.com:8080", True),
        (f"default login user password {KEY}", "https://wandb.example.com:8080", True),
        ("machine api.wandb.ai login user", None, False),
    ],
)
def test_who_is_logged_in_is_who_wandb_finds(home: Path, content: str, url: str | None, known: bool) -> None:
    from wandb.sdk.lib.wbauth import read_netrc_auth

    write(home / ".netrc", content.encode())
    if url:
        os.environ["WANDB_BASE_URL"] = url
    assert logged_in() is known
    assert (read_netrc_auth(host=url or "https://api.wandb.ai") is not None) is known
