"""`python -m lora_exp.dashboard PROJECT`: make a saved workspace at W&B, laid out for sweeps of this project's recipes.

Read in wandb-workspaces 0.4.13. Every call makes a new workspace; those that are there stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_exp.errors import USER_ERROR_STATUS, Problem, UserError, print_user_error
from lora_exp.recipes.base import Recipe
from lora_exp.recipes.dpo import DPO
from lora_exp.recipes.sft import SFT
from lora_exp.secrets.home import hide_unreadable_files
from lora_exp.sweeps.question import FILE, Question
from lora_exp.tracking.wandb import logged_in, set_up

NAME = "lora_exp"
RECIPES: tuple[type[Recipe], ...] = (SFT, DPO)
AXES = ("recipe.beta", "trainer.learning_rate", "recipe.max_length", "lora.r")
"""What most sweeps vary."""
STEP = "train/global_step"
OBJECTIVE = "objective"
MOST_RUNS = 100
"""Runs that a panel draws; W&B's default is 10."""

THROUGHPUT = ("train/train_samples_per_second", "train/train_steps_per_second", "eval/samples_per_second")
PEAK_MEMORY = "peak_memory_bytes"


def metrics() -> dict[str, list[str]]:
    """Return what the panels show over the steps, by section, named as `TrackerFeed` hands it to W&B."""
    headline = list(dict.fromkeys(name for recipe in RECIPES for name in recipe.headline))
    rewards = sorted(name for name in DPO.logged if name.startswith("rewards/"))
    return {
        "Objective": [*(f"eval/{name}" for name in headline), "train/loss"],
        "DPO rewards": [f"{split}/{name}" for name in rewards for split in ("train", "eval")] + ["eval/kl/chosen"],
    }


def save_workspace(project: str, entity: str | None, axes: Sequence[str]) -> str:
    """Save a workspace of the project and return its address.

    Args:
        project: Its name at W&B.
        entity: Whose it is; None: the one that W&B takes for whoever is logged in.
        axes: Config keys and config groups that sweeps vary.

    Raises:
        UserError: If the package is missing, nobody is logged in, or W&B does not take it.
    """
    _require_package()
    import wandb

    if not logged_in():
        mend = "wandb login, or set WANDB_API_KEY"
        raise UserError("the workspace cannot be saved", [Problem("wandb", "nobody is logged in", mend)])
    set_up(wandb)
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        owner = entity or wandb.Api().default_entity
        if not owner:
            raise UserError(
                "the workspace cannot be saved",
                [Problem("--entity", "W&B names none for this account", "--entity <user or team>")],
            )
        saved = workspace(project, owner, axes).save()
        return str(saved.url)
    except (wandb.Error, WandbApiFailedError) as error:
        reason = " ".join(str(error).split())
        mend = "see that the project exists, that --entity is right, and that the login is good"
        problem = Problem(project, f"W&B does not take it: {reason}", mend)
        raise UserError("the workspace cannot be saved", [problem]) from error


def workspace(project: str, entity: str, axes: Sequence[str]) -> Any:
    """Return the workspace, not yet saved: a section a question, the runs grouped by sweep."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    curves = {name: [_curve(wr, metric) for metric in shown] for name, shown in metrics().items()}
    panels = {
        "Objective": [
            wr.BarPlot(title=OBJECTIVE, metrics=[OBJECTIVE], max_bars_to_show=MOST_RUNS),
            *curves["Objective"],
        ],
        "Axes": _axis_panels(wr, axes),
        "DPO rewards": curves["DPO rewards"],
        "Throughput and memory": [_bars(wr, name) for name in (*THROUGHPUT, PEAK_MEMORY)],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[ws.Section(name=name, panels=shown, is_open=True) for name, shown in panels.items()],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Metric("Group")],
            # The run that holds a sweep's leaderboard has the best trial's objective: in a panel it would count twice.
            filters="Metric('JobType') != 'sweep'",
            pinned_columns=[f"summary:{OBJECTIVE}", "summary:status"],
        ),
    )


def _curve(wr: Any, metric: str) -> Any:
    return wr.LinePlot(title=metric, x=STEP, y=[metric])


def _bars(wr: Any, metric: str) -> Any:
    return wr.BarPlot(title=metric, metrics=[metric], max_bars_to_show=MOST_RUNS)


def _axis_panels(wr: Any, axes: Sequence[str]) -> list[Any]:
    """Return all axes against the objective at once, then one by one."""
    objective = wr.SummaryMetric(OBJECTIVE)
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(config_key(axis)), display_name=axis) for axis in axes]
    every = wr.ParallelCoordinatesPlot(
        title="axes and objective",
        columns=[*columns, wr.ParallelCoordinatesPlotColumn(objective)],
        layout=wr.Layout(w=24, h=9),
    )
    return [every, *(wr.ScatterPlot(title=axis, x=wr.Config(config_key(axis)), y=objective) for axis in axes)]


def config_key(axis: str) -> str:
    """Return where W&B's config has an axis, in a form that wandb-workspaces can address.

    It takes a dot for a step into a section, so `sweep/recipe.beta`, one key with a dot in it, cannot be addressed; the
    value stands in the section `recipe` too. A config group has no dot, and its option stands under `sweep/` only.
    """
    return axis if "." in axis else f"sweep/{axis}"


def axes_of(sweep: Path) -> list[str]:
    """Return what a sweep's folder says that it varies.

    Raises:
        UserError: If it holds no sweep.
    """
    question = Question.read(sweep)
    if question is None:
        problem = Problem("--sweep", f"{sweep} has no {FILE}", "name the folder of a sweep, as in multirun/")
        raise UserError("the axes are not known", [problem])
    return question.axes


def _require_package() -> None:
    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError as error:
        problem = Problem("wandb-workspaces", f"cannot be loaded: {error}", "pip install 'lora_exp[dashboard]'")
        raise UserError("the workspace cannot be made", [problem]) from error


def main() -> None:
    """Read the command line and print the address of the workspace."""
    parser = argparse.ArgumentParser(prog="python -m lora_exp.dashboard", description="Make a workspace at W&B.")
    parser.add_argument("project", help="the project at W&B, as in tracker.project")
    parser.add_argument("--entity", help="whose project it is (the login's own)")
    axes = parser.add_mutually_exclusive_group()
    axes.add_argument("--axes", help=f"what sweeps vary, with commas between ({','.join(AXES)})")
    axes.add_argument("--sweep", type=Path, help="a sweep's folder, whose axes to show")
    arguments = parser.parse_args()
    for line in hide_unreadable_files():
        print(f"note: {line}", file=sys.stderr)  # noqa: T201
    try:
        shown = axes_of(arguments.sweep) if arguments.sweep else (arguments.axes or ",".join(AXES)).split(",")
        print(save_workspace(arguments.project, arguments.entity, shown))  # noqa: T201
    except UserError as error:
        print_user_error(error)
        sys.exit(USER_ERROR_STATUS)


if __name__ == "__main__":
    main()
