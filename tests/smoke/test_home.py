"""Real runs of a user whose home folder holds files that cannot be read, or who has none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.smoke.test_safety import TRAINS

NOTE = "~/.netrc is left out: it is not UTF-8 text (line 2)"
NOTE_HERE = "wandb/settings is left out: it is not UTF-8 text (line 2)"
WITHOUT = ("WANDB_DIR", "NETRC", "HF_HOME", "HF_TOKEN_PATH", "WANDB_API_KEY", "WANDB_MODE")


def lora_exp(home: Path, cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(home, cwd, "-m", *arguments, **environment)


def python(home: Path, cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name not in WITHOUT}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**given, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder whose netrc is in Latin-1."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / ".netrc").write_bytes(
        "machine a login b password c\nmachine b login andré password d\n".encode("latin-1")
    )
    return folder


@pytest.mark.parametrize(
    ("arguments", "environment", "folders"),
    [
        (["tracker=wandb", "output_dir=run"], {"WANDB_MODE": "offline"}, ["run"]),
        (["tracker=wandb", "tracker.mode=online", "output_dir=run"], {"WANDB_BASE_URL": "http://127.0.0.1:9"}, ["run"]),
        (
            ["-m", "tracker=none", "sweep.name=two", "seed=1,2"],
            {},
            ["multirun/two/seed=1", "multirun/two/seed=2"],
        ),
    ],
    ids=["wandb offline", "wandb online without a key", "sweep"],
)
def test_files_that_are_not_utf_8_are_left_out_with_one_note_each(
    home: Path, tmp_path: Path, arguments: list[str], environment: dict[str, str], folders: list[str]
) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_bytes(b"[default]\nentity = andr\xe9\n")
    done = lora_exp(home, tmp_path, "lora_exp", *arguments, *TRAINS, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for note in (NOTE, NOTE_HERE):
        assert (done.stdout + done.stderr).count(note) == 1
    for folder in folders:
        assert json.loads((tmp_path / folder / "run.json").read_text())["status"] == "finished"
    if "tracker=wandb" in arguments:
        assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")), done.stdout


def test_other_commands_leave_it_out_too(home: Path, tmp_path: Path) -> None:
    dry = lora_exp(home, tmp_path, "lora_exp", "dry_run=true")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count(NOTE) == 1
    saved = lora_exp(home, tmp_path, "lora_exp.dashboard", "project")
    assert saved.returncode == 2
    assert saved.stderr.count(NOTE) == 1
    assert "nobody is logged in" in saved.stderr


def test_help_and_errors_of_the_config_say_nothing_of_it(home: Path, tmp_path: Path) -> None:
    for arguments in (["--help"], ["--cfg", "job"], ["recipe.beta=x"]):
        done = lora_exp(home, tmp_path, "lora_exp", *arguments)
        assert "Traceback" not in done.stderr
        assert "netrc" not in done.stdout + done.stderr


SETTINGS = """
import wandb
from lora_exp.secrets.home import hide_unreadable_files
from lora_exp.tracking.wandb import set_up
print(hide_unreadable_files())
set_up(wandb)
print(wandb.setup().settings.entity)
"""


def settings_found(home: Path, cwd: Path, **environment: str) -> list[str]:
    """Return the notes and the entity that W&B has from its settings."""
    done = python(home, cwd, "-c", SETTINGS, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def settings_in(folder: Path, entity: bytes) -> None:
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "settings").write_bytes(b"[default]\nentity = " + entity + b"\n")


def test_settings_that_another_user_may_have_planted_are_not_read_instead(tmp_path: Path) -> None:
    """Anybody can write to the folder of temporary files, and settings name the server that gets the key."""
    settings_in(tmp_path / "here", b"andr\xe9")
    settings_in(tmp_path / "tmp", b"planted")
    found = settings_found(tmp_path, tmp_path / "here", TMPDIR=str(tmp_path / "tmp"))
    assert found == [f"['{NOTE_HERE}']", "None"]


@pytest.mark.parametrize(
    ("here", "there", "found"),
    [(b"andr\xe9", b"other", [f"['{NOTE_HERE}']", "None"]), (b"me", b"andr\xe9", ["[]", "me"])],
)
def test_settings_are_looked_for_where_wandb_reads_them(
    tmp_path: Path, here: bytes, there: bytes, found: list[str]
) -> None:
    """W&B reads those of the working folder before it looks at WANDB_DIR."""
    settings_in(tmp_path / "here", here)
    settings_in(tmp_path / "there", there)
    assert settings_found(tmp_path, tmp_path / "here", WANDB_DIR=str(tmp_path / "there")) == found


def test_a_working_folder_that_may_not_be_entered_costs_no_record(tmp_path: Path) -> None:
    """As after `su` from a home folder of mode 700; W&B raises where it looks for its settings."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can take its rights away from a command")
    here, run = tmp_path / "here", tmp_path / "run"
    here.mkdir(mode=0o700)
    os.chown(here, 12345, -1)
    rights = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    words = [*rights, sys.executable, "-m", "lora_exp", "tracker=wandb", "tracker.mode=offline", *TRAINS]
    done = subprocess.run([*words, f"output_dir={run}"], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((run / "wandb").glob("offline-run-*/*.wandb")), done.stdout
