"""`python -m lora_exp.reproduce <run folder>`: run it again beside itself, and say what differs.

First what it is made of - versions, git, data, device, base -, before anything is trained; then what came out of it.
Exit status: 0 where the adapter is bitwise equal and every number the same, 1 where not, 2 for what the user can mend.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from lora_exp.config import CONF_DIR
from lora_exp.errors import USER_ERROR_STATUS, Interrupted, Problem, UserError, print_user_error
from lora_exp.process.ranks import require_one_process
from lora_exp.process.start import start_process
from lora_exp.process.threads import recorded_threads
from lora_exp.provenance import data_file, git_state, sha256, versions
from lora_exp.reports.console import say
from lora_exp.reports.differences import Difference, input_differences, outcome, tell_inputs, tell_outcome
from lora_exp.reports.results import read_results
from lora_exp.resolvers import register_resolvers
from lora_exp.run_folder import RunFolder

DIFFERS_STATUS = 1
RECORD = "reproduction.json"
TITLE = "the run cannot be reproduced"


def reproduce(folder: Path, output: Path | None, anyway: bool) -> int:
    """Run again what a folder holds, compare, and return the exit status.

    Args:
        folder: The run's.
        output: Where the second run goes; None: beside the first.
        anyway: Whether to go on where data changed.

    Raises:
        UserError: If there is no finished run, its data are not what they were, or the second run cannot start.
    """
    then = finished_run(folder)
    beside = output or _free(folder)
    composed = config_of(folder)
    say("again", f"{folder}, in {beside}")
    found = input_differences(then, {"versions": versions(), "git": git_state(), "data": _data_now(then["data"])})
    tell_inputs(found, "versions, git and data files")
    _require_same_data(then["data"], anyway)

    def compare_loaded(facts: Mapping[str, Any]) -> None:
        loaded = input_differences(then, {part: facts[part] for part in ("data", "device", "base", "start_adapter")})
        news = [each for each in loaded if each not in found]
        tell_inputs(news, "device, threads and weights")
        found.extend(news)
        if not anyway and (changed := [each for each in news if each.name.startswith("data ")]):
            raise UserError(TITLE, [_changed(each.name, each.then, each.now) for each in changed])
        _keep_overrides(folder, beside)

    choices = {**(then.get("choices") or {}), "tracker": "none"}
    _train(composed, beside, choices, recorded_threads(folder), compare_loaded)
    return _compare(folder, beside, found)


def finished_run(folder: Path) -> dict[str, Any]:
    """Return `run.json` of a run that can be reproduced.

    Raises:
        UserError: If the folder holds no finished run, or one of a version that did not note its data.
    """
    facts = read_results(folder).run
    if facts.get("status") != "finished":
        what = f"holds a run that is {facts.get('status')}, so there is nothing to compare with"
        raise UserError(TITLE, [Problem(str(folder), what, "name the folder of a finished run")])
    missing = [part for part in ("data", "base") if part not in facts]
    if missing:
        what = f"does not say what the run was made of: {' and '.join(missing)}; it is of an earlier version"
        raise UserError(TITLE, [Problem(str(folder / "run.json"), what, "start the run again with this version")])
    return facts


def config_of(folder: Path) -> DictConfig:
    """Return the config of a run, as it is to run again: from the beginning, and with nobody who watches.

    Raises:
        UserError: If it takes a value from the environment that is not there.
    """
    composed = OmegaConf.load(folder / "config.yaml")
    assert isinstance(composed, DictConfig)
    try:
        OmegaConf.to_container(composed, resolve=True)
    except InterpolationResolutionError as error:
        what = str(error).splitlines()[0]
        raise UserError(TITLE, [Problem(str(error.full_key), what, "set the variable that the run had")]) from error
    composed.resume = None
    composed.tracker = OmegaConf.load(CONF_DIR / "tracker" / "none.yaml")
    return composed


def _free(folder: Path) -> Path:
    """Return the first name beside a run that nothing has yet."""
    names = (f"{folder.name}-reproduced{number}" for number in ("", *(f"-{each}" for each in range(2, 1000))))
    return next(path for name in names if not (path := folder.resolve().with_name(name)).exists())


def _data_now(then: Mapping[str, Any]) -> dict[str, Any]:
    """Return the digests of the files of a run's data as they are now; None for one that is gone."""
    return {
        split: {**facts, "sha256": {file: _digest(data_file(file)) for file in facts["sha256"]}}
        for split, facts in then.items()
    }


def _digest(file: Path) -> str | None:
    return sha256(file) if file.is_file() else None


def _require_same_data(then: Mapping[str, Any], anyway: bool) -> None:
    problems = [
        _changed(file, digest, now)
        for facts in then.values()
        for file, digest in facts["sha256"].items()
        if (now := _digest(data_file(file))) != digest
    ]
    if problems and not anyway:
        raise UserError(TITLE, problems)


def _changed(name: str, then: str, now: str | None) -> Problem:
    if now is None:
        return Problem(name, "is gone", "put it back; a relative path is looked up in the working folder")
    what = f"is not what it was: {then[:12]} then, {now[:12]} now"
    return Problem(name, what, "bring the old one back, or add --anyway to see what comes out of the new one")


def _keep_overrides(folder: Path, beside: Path) -> None:
    """Copy what `resume=` reads, so that a reproduction which was stopped goes on like any run."""
    if (folder / ".hydra").is_dir():
        shutil.copytree(folder / ".hydra", beside / ".hydra", dirs_exist_ok=True)


def _train(composed: DictConfig, folder: Path, choices: Mapping[str, str], threads: int | None, compare: Any) -> None:
    from lora_exp.run import Launch, run

    run(composed, Launch(folder, choices, threads=threads, before_training=compare))


def _compare(folder: Path, beside: Path, inputs: list[Difference]) -> int:
    """Print and write down what came out, and return the exit status."""
    found = outcome(folder, beside)
    tell_outcome(found)
    record = {
        "of": str(folder),
        "same": found.same,
        "adapter": found.adapter or "bitwise equal",
        "inputs": [asdict(each) for each in inputs],
        "numbers": [asdict(each) for each in found.numbers],
    }
    RunFolder(beside).write_json(RECORD, record)
    return 0 if found.same else DIFFERS_STATUS


def main() -> None:
    """Read the command line."""
    start_process()
    parser = argparse.ArgumentParser(prog="python -m lora_exp.reproduce", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the folder of a finished run")
    parser.add_argument("--output", type=Path, help="where the second run goes (beside the first)")
    parser.add_argument("--anyway", action="store_true", help="go on where data are not what they were")
    arguments = parser.parse_args()
    register_resolvers()
    try:
        require_one_process()
        sys.exit(reproduce(arguments.folder, arguments.output, arguments.anyway))
    except UserError as error:
        print_user_error(error)
        sys.exit(USER_ERROR_STATUS)
    except Interrupted as asked:
        print_user_error(asked)
        sys.exit(asked.status)


if __name__ == "__main__":
    main()
