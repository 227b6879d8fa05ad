"""Between the command line and Hydra: resume, the check of every job before the first one starts, failures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_exp.errors import Problem, UserError
from lora_exp.process.ranks import require_one_process
from lora_exp.search.pruning import SearchTrial
from lora_exp.sweeps.names import key_of, trial_name
from lora_exp.sweeps.summary_run import group_of
from lora_exp.sweeps.supervisor import supervise

if TYPE_CHECKING:
    from lora_exp.compose import Composer


def prepare(argv: list[str]) -> tuple[list[str], Path | None]:
    """Return the arguments to hand to Hydra, once every job that they mean has been checked, and a multirun's folder.

    With `dry_run=true` the process ends here.

    `resume=<folder>` brings the overrides of the run in that folder along, and its `--config-dir`.

    Raises:
        UserError: Everything that is wrong with the config of any job.
    """
    from hydra._internal.utils import get_args_parser

    from lora_exp.search.sweeper import register
    from lora_exp.sweeps.start import check_trials, start_sweep

    arguments, unknown = get_args_parser().parse_known_args(argv)
    if unknown or arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion:
        return argv, None
    require_one_process()
    sweep = None
    resumed = resumed_overrides(arguments.overrides)
    flags: list[str] = []
    run_folder = _given(arguments.overrides).get("resume")
    if run_folder and not arguments.config_dir:
        arguments.config_dir = _resumed_config_dir(run_folder)
        flags = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    overrides = resumed + [_without_plus(each) for each in arguments.overrides]
    with _composer(arguments) as composer:
        if arguments.cfg:
            composer.compose(overrides, check_values=False)
        elif arguments.multirun:
            register()
            trials = check_trials(composer, overrides)
            if any(config.dry_run for config in trials.configs):
                _dry_run(composer, trials.configs, trials.jobs, trials.plan.axes)
            plan = start_sweep(trials)
            overrides, sweep = plan.overrides, plan.folder
            supervise(sweep)
        else:
            composed = _check_run(composer, overrides)
            if composed.dry_run:
                _dry_run(composer, [composed], [overrides], ())
            # Hydra would write over what the run is made of, in place: a kill in that moment would lose it.
            overrides += ["hydra.output_subdir=null"] if goes_on(overrides) else []
    return [*flags, *(each for each in argv if each not in arguments.overrides), *overrides], sweep


def _composer(arguments: argparse.Namespace) -> Composer:
    from lora_exp.compose import Composer

    config_dir = Path(arguments.config_dir).resolve() if arguments.config_dir else None
    return Composer(config_dir, arguments.config_name)


def _without_plus(override: str) -> str:
    """`+experiment=...` is what Hydra asks for where nothing is chosen by default; both ways of writing work here."""
    return override.removeprefix("+") if override.startswith("+experiment=") else override


def _check_run(composer: Composer, overrides: list[str]) -> DictConfig:
    """Compose and check a single run, and return its config.

    What it goes on from must be there, and its folder free and able to be written.
    """
    from lora_exp.disk import unwritable
    from lora_exp.models.source import adapter_dir, local_dir
    from lora_exp.run_folder import holds_run, links_out, taken
    from lora_exp.run_lock import hold
    from lora_exp.validation import validate

    composed = composer.compose(overrides, check_values=True)
    model = validate(composed).model
    if model.embedded is None:
        local_dir(model)
    adapter_dir(model)
    if composed.dry_run:
        return composed
    # Said here too, because Hydra writes to the folder before the run itself can look.
    folder = Path(composed.output_dir)
    problem = unwritable(folder)
    problems = [problem] if problem is not None else links_out(folder)
    if problems:
        raise UserError("the run cannot start", problems)
    if folder.is_dir():  # a new one is named by the second, and made by Hydra
        hold(folder)
    if composed.resume != composed.output_dir and holds_run(folder):
        raise UserError("the run cannot start", [taken(folder)])
    return composed


def _dry_run(
    composer: Composer, configs: Sequence[DictConfig], jobs: Sequence[list[str]], axes: tuple[str, ...]
) -> NoReturn:
    """Say what the runs would cost, and end the process. Hydra, which would make folders, is not asked."""
    from lora_exp.dry_run import Job, dry_run
    from lora_exp.validation import validate

    given = [_given(overrides) for overrides in jobs]
    asked = [
        Job(trial_name(overrides, axes), validate(config), {axis: values.get(axis, "") for axis in axes})
        for config, overrides, values in zip(configs, jobs, given, strict=True)
    ]
    sys.exit(dry_run(asked, composer.choices(jobs[0])))


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
    text = saved.read_text(encoding="utf-8")
    if not text.strip():
        what = f"the run in {folder} was stopped before it had noted what it is"
        raise UserError("the run cannot be resumed", [Problem("resume", what, "give its command again")])
    earlier: Any = OmegaConf.to_container(OmegaConf.create(text))  # as typed: `${oc.env:...}` is not resolved
    return [override for override in map(str, earlier) if key_of(override) not in {*given, "output_dir", "resume"}]


def goes_on(overrides: list[str]) -> bool:
    """Whether a run goes on in its folder."""
    given = _given(overrides)
    return given.get("resume", "null") != "null" and not given.keys() & {"output_dir", "hydra.output_subdir"}


def _resumed_config_dir(run_folder: str) -> str | None:
    """Return the `--config-dir` that a run was composed with, as Hydra noted it; None where it had none."""
    hydra_yaml = Path(run_folder) / ".hydra" / "hydra.yaml"
    if not hydra_yaml.is_file():
        return None
    sources = OmegaConf.load(hydra_yaml).hydra.runtime.config_sources
    return next((source.path for source in sources if source.provider == "command-line"), None)


def _given(overrides: list[str]) -> dict[str, str]:
    return {key_of(override): override.partition("=")[2] for override in overrides}


def launch_from_hydra() -> Any:
    """Read from Hydra where this job runs and what it was composed of."""
    from lora_exp.run import Launch
    from lora_exp.run_folder import write_whole

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    choices = {group: option for group, option in hydra_config.runtime.choices.items() if "/" not in group}
    if hydra_config.mode == RunMode.MULTIRUN:
        sweep = group_of(Path(hydra_config.sweep.dir))
        trial = SearchTrial.of(hydra_config.sweeper, hydra_config.job.num)
        return Launch(folder, choices, sweep, f"{choices['recipe']}-{choices['model']} {folder.name}", trial)
    if hydra_config.output_subdir is None and (saved := folder / ".hydra" / "overrides.yaml").is_file():
        write_whole(saved, OmegaConf.to_yaml(hydra_config.overrides.task))
    return Launch(folder, choices, None, f"{choices['recipe']}-{choices['model']} {'_'.join(folder.parts[-2:])}")
