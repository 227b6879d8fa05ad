"""`hydra/sweeper=optuna`: Hydra asks this plugin which trials there are, and it asks Optuna, one after the other.

Read in Hydra 1.3.8: a sweeper is a registered class that can be imported from below `hydra_plugins`; this module is
given such a name too, so that the project needs no top-level folder of that name.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lora_exp.errors import USER_ERROR_STATUS, UserError, print_user_error
from lora_exp.run_folder import write_whole
from lora_exp.sweeps import supervisor
from lora_exp.sweeps.earlier import earlier_trial
from lora_exp.sweeps.trials import Direction, directions_of

if TYPE_CHECKING:
    from lora_exp.search.study import Outcome, Search

RESULTS = "optimization_results.yaml"


class OptunaSweeper(Sweeper):
    """Draws the trials of a multirun from a study.

    Args:
        settings: The keys of `conf/hydra/sweeper/optuna.yaml`.
    """

    def __init__(self, params: Mapping[str, str] | None, **settings: Any) -> None:
        self.params = params or {}
        self.settings = settings
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until there are enough of them.

        Args:
            arguments: The overrides of the command line, without Hydra's own.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        given = {each.key_or_group: each for each in parsed}
        fixed = [str(each.input_line) for each in given.values() if not each.is_sweep_override()]
        folder = Path(self.config.hydra.sweep.dir)
        try:
            search = self._open(given)
        except UserError as error:
            print_user_error(error)
            sys.exit(USER_ERROR_STATUS)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        search.retry_failed()
        while (trial := search.next()) is not None:
            search.tell(trial.number, self._run([*fixed, *search.overrides(trial)], trial.number))
            write_whole(folder / RESULTS, OmegaConf.to_yaml(OmegaConf.create(search.results())))

    def _open(self, given: Mapping[str, Any]) -> Search:
        from lora_exp.search.axes import axes_of
        from lora_exp.search.study import open_search

        assert self.config is not None
        objective = self.config.objective or self.config.recipe.objective
        ways: list[Direction] = directions_of(objective, self.config.direction)
        return open_search(self.settings, axes_of(given.values()), ways, datetime.fromtimestamp(supervisor.began))

    def _run(self, overrides: list[str], number: int) -> Outcome:
        """Run one job and return what its folder says of it."""
        from lora_exp.search.study import Outcome

        assert self.launcher is not None
        self.validate_batch_is_legal([overrides])
        (job,) = self.launcher.launch([overrides], initial_job_idx=number)
        _ = job.return_value  # raises what the job raised
        assert job.hydra_cfg is not None
        found = earlier_trial(Path(job.hydra_cfg.hydra.runtime.output_dir))
        return Outcome(found.status, found.objectives) if found else Outcome("failed", None)


def register() -> None:
    """Make the sweeper known to Hydra, beside the plugins that are installed."""
    try:
        top = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        top = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        top.__path__ = []
    name = "hydra_plugins.lora_exp"
    sys.modules[name] = top.lora_exp = sys.modules[__name__]  # type: ignore[attr-defined]
    OptunaSweeper.__module__ = name
    Plugins.instance().register(OptunaSweeper)
