"""The study of a search: which trial comes next, what became of the last one; in SQLite, a kill loses nothing.

A search that is killed and started again draws what it would have drawn: each trial's sampler starts from the seed and
the trial's number, and everything else that a sampler goes by is in the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.trial import TrialState

from lora_exp.errors import Problem, UserError
from lora_exp.search.axes import Axis
from lora_exp.sweeps.trials import Direction

RETRY_OF = "retry_of"
"""Of a trial that tries again what an earlier one failed at: the number of that one."""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Args:
        status: Of its `run.json`.
        objectives: What it found, where it finished.
    """

    status: str
    objectives: Sequence[float] | None


@dataclass(frozen=True)
class Search:
    """An Optuna study with what it varies.

    Args:
        study: Optuna's.
        axes: By key.
        sampler: The config of what draws a trial.
        n_trials: How many trials there are to be.
        began: When the command was started; what failed before is tried again.
    """

    study: optuna.Study
    axes: Mapping[str, Axis]
    sampler: Mapping[str, Any]
    n_trials: int
    began: datetime

    def next(self) -> optuna.Trial | None:
        """Return the trial to run now, one that was interrupted first; None once there are enough."""
        self.study.sampler = self._sampler(len(self.study.trials))
        interrupted = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if interrupted:
            self.study.sampler = self._sampler(interrupted[0].number)
            trial = optuna.Trial(self.study, interrupted[0]._trial_id)
        elif self._is_enough():
            return None
        else:
            trial = self.study.ask()
        for key, axis in self.axes.items():
            _suggest(trial, key, axis)
        return trial

    def overrides(self, trial: optuna.Trial) -> list[str]:
        """Return what a trial varies, as Hydra takes it."""
        return [axis.override(trial.params[key]) for key, axis in self.axes.items()]

    def tell(self, number: int, outcome: Outcome) -> None:
        """Record what became of a trial."""
        if outcome.status == "finished" and outcome.objectives is not None:
            self.study.tell(number, list(outcome.objectives))
        else:
            state = TrialState.PRUNED if outcome.status == "pruned" else TrialState.FAIL
            self.study.tell(number, state=state)

    def retry_failed(self) -> None:
        """Put what failed in earlier commands up again, with the same values."""
        superseded = self._superseded()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
            before = trial.datetime_complete is not None and trial.datetime_complete < self.began
            if before and trial.number not in superseded:
                self.study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number})

    def results(self) -> dict[str, Any]:
        """Return the best trial's values, or with several objectives those of all that no other one beats."""
        if len(self.study.directions) > 1:
            solutions = [{"params": t.params, "values": t.values} for t in self.study.best_trials]
            return {"name": "optuna", "solutions": solutions}
        if not self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            return {"name": "optuna", "best_params": None, "best_value": None}
        best = self.study.best_trial
        return {"name": "optuna", "best_params": best.params, "best_value": best.value}

    def _is_enough(self) -> bool:
        superseded = self._superseded()
        ended = [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()]
        return sum(trial.number not in superseded for trial in ended) >= self.n_trials

    def _superseded(self) -> set[int]:
        return {t.user_attrs[RETRY_OF] for t in self.study.get_trials(deepcopy=False) if RETRY_OF in t.user_attrs}

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Return the sampler of one trial."""
        seed = self.sampler.get("seed")
        own = {"seed": seed + number} if isinstance(seed, int) else {}
        made: optuna.samplers.BaseSampler = instantiate({**self.sampler, **own})
        return made


def open_search(
    sweeper: Mapping[str, Any], axes: Mapping[str, Axis], directions: Sequence[Direction], began: datetime
) -> Search:
    """Open the study of a sweep, or make it.

    Args:
        sweeper: `n_trials`, `storage`, `study_name`, `sampler` and `pruner`, as in `conf/hydra/sweeper/optuna.yaml`.
        axes: What is varied.
        directions: One for each objective.
        began: When the command was started.

    Raises:
        UserError: If Optuna takes the sampler, the pruner or the storage not, or the study varies something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = OmegaConf.to_container(OmegaConf.create(sweeper["sampler"]), resolve=True)
    assert isinstance(sampler, dict)
    named = {str(key): value for key, value in sampler.items()}
    _make("hydra.sweeper.sampler", named)
    pruner = _make("hydra.sweeper.pruner", sweeper["pruner"])
    study = _open(sweeper["storage"], sweeper["study_name"], directions, pruner)
    _require_same_axes(study, axes)
    return Search(study, axes, named, sweeper["n_trials"], began)


def check_search(sweeper: Mapping[str, Any]) -> None:
    """Check what a search is made of, with nothing written.

    Args:
        sweeper: `sampler`, `pruner` and `storage`.

    Raises:
        UserError: If Optuna takes one of them not. A file of SQLite is looked at when the search opens it.
    """
    _make("hydra.sweeper.sampler", sweeper["sampler"])
    _make("hydra.sweeper.pruner", sweeper["pruner"])
    if not sweeper["storage"].startswith("sqlite:///"):
        try:
            optuna.storages.get_storage(sweeper["storage"])
        except Exception as error:
            raise _no_storage(sweeper["storage"], error) from error


def _open(storage: str, name: str, directions: Sequence[Direction], pruner: Any) -> optuna.Study:
    try:
        if storage.startswith("sqlite:///"):
            Path(storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=storage, study_name=name, directions=list(directions), pruner=pruner, load_if_exists=True
        )
    except Exception as error:
        raise _no_storage(storage, error) from error
    before = [each.name.lower() for each in study.directions]
    if before != list(directions):
        what = f"the study was to {' and '.join(before)}, and is to {' and '.join(directions)} now"
        raise UserError("the search cannot start", [Problem("direction", what, "use another sweep.name=...")])
    return study


def _no_storage(storage: str, error: Exception) -> UserError:
    problem = Problem("hydra.sweeper.storage", f"{storage} cannot be opened: {_in_a_line(error)}")
    return UserError("the search cannot start", [problem])


def _make(key: str, config: Mapping[str, Any]) -> Any:
    """Instantiate what a config names.

    Raises:
        UserError: If there is no such class, or it takes other arguments.
    """
    try:
        return instantiate(config)
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError("the search cannot start", [Problem(key, _in_a_line(cause))]) from error


def _require_same_axes(study: optuna.Study, axes: Mapping[str, Axis]) -> None:
    """Refuse to draw from other values under the same name; the bounds of a range may move."""
    problems = []
    for trial in study.get_trials(deepcopy=False)[:1]:
        for key, before in trial.distributions.items():
            try:
                check_distribution_compatibility(before, axes[key].distribution)
            except KeyError:
                problems.append(Problem(key, "was varied by this study and is not any more", "use another sweep.name"))
            except ValueError as error:
                problems.append(Problem(key, _in_a_line(error), "use another sweep.name"))
    if problems:
        raise UserError("the search cannot go on as something else", problems)


def _suggest(trial: optuna.Trial, key: str, axis: Axis) -> None:
    """Draw a value, or keep the one that the trial has."""
    drawn = axis.distribution
    if isinstance(drawn, CategoricalDistribution):
        trial.suggest_categorical(key, drawn.choices)
    elif isinstance(drawn, IntDistribution):
        trial.suggest_int(key, drawn.low, drawn.high, step=drawn.step, log=drawn.log)
    else:
        assert isinstance(drawn, FloatDistribution)
        trial.suggest_float(key, drawn.low, drawn.high, step=drawn.step, log=drawn.log)


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
