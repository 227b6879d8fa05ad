"""A trial of a search, seen from its run: it reports each evaluation and is told whether to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class SearchTrial:
    """One trial of a study.

    Args:
        storage: The URL of the database.
        study_name: The study in it.
        number: The trial's.
        pruner: The config of what ends a trial that falls behind.
    """

    storage: str
    study_name: str
    number: int
    pruner: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, sweeper: Any, number: int) -> SearchTrial | None:
        """Return the trial of a job; None where it is none of a search.

        Args:
            sweeper: `hydra.sweeper`.
            number: `hydra.job.num`.
        """
        if "study_name" not in sweeper:
            return None
        return cls(sweeper.storage, sweeper.study_name, number, sweeper.pruner)

    def falls_behind(self, value: float, evaluation: int) -> bool:
        """Report the objective of an evaluation and return whether the pruner ends the trial.

        Args:
            value: The objective.
            evaluation: How many came before it; trials are compared at the same one.
        """
        if len(self._trial.study.directions) > 1:  # Optuna prunes by one objective only
            return False
        reported = self._trial.storage.get_trial(self._trial._trial_id).intermediate_values
        if evaluation not in reported:  # a trial that goes on from a checkpoint comes by here again
            self._trial.report(value, evaluation)
        return self._trial.should_prune()

    @cached_property
    def _trial(self) -> optuna.Trial:
        import optuna
        from hydra.utils import instantiate

        sampler = optuna.samplers.RandomSampler()  # nothing is drawn here
        study = optuna.load_study(
            study_name=self.study_name, storage=self.storage, sampler=sampler, pruner=instantiate(self.pruner)
        )
        found = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == self.number)
        return optuna.Trial(study, found._trial_id)
