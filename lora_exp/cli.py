"""Between the command line and Hydra: resume, the check of every job before the first one starts, failures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from lora_exp.errors import USER_ERROR_STATUS, Problem, UserError, count, print_user_error


def prepare(argv: list[str]) -> list[str]:
    """Return the arguments to hand to Hydra, once every job that they mean has been checked.

    `resume=<folder>` brings the overrides of the run in that folder along, and its `--config-dir`.

    Raises:
        UserError: Everything that is wrong with the config of any job.
    """
    from hydra._internal.utils import get_args_parser

    arguments, unknown = get_args_parser().parse_known_args(argv)
    if unknown or arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion:
        return argv
    resumed = resumed_overrides(arguments.overrides)
    flags: list[str] = []
    run_folder = _given(arguments.overrides).get("resume")
    if run_folder and not arguments.config_dir:
        arguments.config_dir = _resumed_config_dir(run_folder)
        flags = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    check = _check_composes if arguments.cfg else _check_jobs
    check(arguments, resumed + arguments.overrides)
    return flags + resumed + argv


def _search_path(arguments: argparse.Namespace) -> Path | None:
    return Path(arguments.config_dir).resolve() if arguments.config_dir else None


def _check_composes(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from lora_exp.compose import Composer

    with Composer(_search_path(arguments), arguments.config_name) as composer:
        composer.compose(overrides, check_values=False)


def _check_jobs(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Compose and check every job of the command line; a single run's folder must be free."""
    from lora_exp.compose import Composer
    from lora_exp.run_folder import holds_run, taken

    with Composer(_search_path(arguments), arguments.config_name) as composer:
        jobs = composer.jobs(overrides) if arguments.multirun else [overrides]
        problems: dict[Problem, None] = {}
        for job in jobs:
            try:
                composed = composer.compose(job, check_values=True)
            except UserError as error:
                problems |= dict.fromkeys(error.problems)
        if problems:
            raise UserError(f"the config has {count(len(problems), 'problem')}", problems)
    # Said here too, because Hydra writes to the folder before the run itself can look.
    if not arguments.multirun and composed.resume != composed.output_dir:
        folder = Path(composed.output_dir)
        if holds_run(folder):
            raise UserError("the run cannot start", [taken(folder)])


def resumed_overrides(overrides: list[str]) -> list[str]:
    """Return the overrides of the run that `resume=` names, less those that are given anew.

    The folder itself is where the run goes on, unless another `output_dir` is given.

    Raises:
        UserError: If the folder holds no run.
    """
    given = _given(overrides)
    folder = given.get("resume")
    if not folder or folder == "null":
        return []
    saved = Path(folder) / ".hydra" / "overrides.yaml"
    if not saved.is_file():
        what = f"{folder} holds no run" if Path(folder).is_dir() else f"there is no folder {folder}"
        raise UserError(
            "the run cannot be resumed", [Problem("resume", what, "name the folder of a run, as in outputs/")]
        )
    earlier = [str(override) for override in OmegaConf.load(saved)]
    return [override for override in earlier if _key(override) not in {*given, "output_dir", "resume"}]


def _resumed_config_dir(run_folder: str) -> str | None:
    """Return the `--config-dir` that a run was composed with, as Hydra noted it; None where it had none."""
    hydra_yaml = Path(run_folder) / ".hydra" / "hydra.yaml"
    if not hydra_yaml.is_file():
        return None
    sources = OmegaConf.load(hydra_yaml).hydra.runtime.config_sources
    return next((source.path for source in sources if source.provider == "command-line"), None)


def _given(overrides: list[str]) -> dict[str, str]:
    return {_key(override): override.partition("=")[2] for override in overrides}


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def launch_from_hydra() -> Any:
    """Read from Hydra where this job runs and what it was composed of."""
    from lora_exp.run import Launch

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    choices = {group: option for group, option in hydra_config.runtime.choices.items() if "/" not in group}
    multirun = hydra_config.mode == RunMode.MULTIRUN
    sweep = "_".join(Path(hydra_config.sweep.dir).parts[-2:]) if multirun else None
    varied = hydra_config.job.override_dirname if multirun else "_".join(folder.parts[-2:])
    return Launch(folder, choices, sweep, f"{choices['recipe']}-{choices['model']} {varied}")


class JobFailures:
    """What users did wrong in the jobs of this process: printed as it happens, raised once all have run."""

    def __init__(self) -> None:
        self.failed: list[UserError] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run one job; its user error is printed and kept, so that the other jobs of a multirun still run."""
        try:
            yield
        except UserError as error:
            print_user_error(error)
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                raise SystemExit(USER_ERROR_STATUS) from None
            self.failed.append(error)

    def raise_if_any(self) -> None:
        """Raise where a job failed.

        Raises:
            UserError: How many jobs failed.
        """
        if self.failed:
            raise UserError(f"{len(self.failed)} of the jobs failed; see above")


job_failures = JobFailures()
