"""What the dashboard refuses, and the layout that it makes; saved, it is looked at in smoke/test_wandb_online.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp.dashboard import AXES, axes_of, config_key, workspace
from lora_exp.errors import UserError
from lora_exp.sweeps.question import Question

WITHOUT_THE_PACKAGE = """
import sys
sys.modules["wandb_workspaces"] = None
sys.argv = ["dashboard", "p"]
from lora_exp.dashboard import main
main()
"""


def run(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(cwd), "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_who_is_not_logged_in_is_told_how(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "lora_exp.dashboard", "p")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: the workspace cannot be saved",
        "  wandb: nobody is logged in",
        "      wandb login, or set WANDB_API_KEY",
    ]


def test_a_missing_package_is_told_with_its_install(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", WITHOUT_THE_PACKAGE)
    assert done.returncode == 2
    assert "wandb-workspaces: cannot be loaded: " in done.stderr
    assert done.stderr.endswith("\n      pip install 'lora_exp[dashboard]'\n")


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no sweep\.json"):
        axes_of(tmp_path)
    done = run(tmp_path, "-m", "lora_exp.dashboard", "p", "--sweep", "multirun/none")
    assert done.returncode == 2
    assert "--sweep: multirun/none has no sweep.json" in done.stderr


def test_the_axes_are_those_of_the_sweep(tmp_path: Path) -> None:
    Question(["recipe.beta", "model"], [], {}).write(tmp_path)
    assert axes_of(tmp_path) == ["recipe.beta", "model"]


def test_a_config_group_is_looked_up_among_the_swept_keys() -> None:
    assert [config_key(axis) for axis in ("model", "recipe.beta")] == ["sweep/model", "recipe.beta"]


@pytest.mark.parametrize("axes", [AXES, ("model", "trainer.learning_rate")])
def test_each_axis_has_a_column_and_a_panel_of_its_own(axes: tuple[str, ...]) -> None:
    section = next(each for each in workspace("p", "e", axes).sections if each.name == "Axes")
    every, *single = section.panels
    assert [column.display_name for column in every.columns] == [*axes, None]
    assert [panel.title for panel in single] == list(axes)
