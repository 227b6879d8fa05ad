"""Compose configs as Hydra will, and name everything that is wrong with the overrides at once.

Hydra stops at the first wrong key. Here the wrong ones are set aside one by one until the rest composes, so that the
values can be checked too.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from lora_exp.config import CONF_DIR
from lora_exp.errors import Problem, UserError, count
from lora_exp.library_fields import library_fields, nearest
from lora_exp.rules import flatten
from lora_exp.secrets.refusal import hydra_problems
from lora_exp.sweeps.plan import SweepSettings, parsed_where_possible
from lora_exp.validation import check, not_taken, option_keys, options_with, section_of

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError, YAMLError)
"""What Hydra raises for overrides that do not fit; ValueError for `quant=8`, an option that is no string; YAMLError for
a file of one's own that is none."""

SWEEP_KEYS = ("hydra", "sweep", "seed", "experiment")
"""What may say something of a multirun as a whole."""


class Composer:
    """Composes within a `with` block.

    Args:
        config_dir: A folder of one's own configs (`--config-dir`), searched beside `conf/`.
        config_name: The primary config (`--config-name`).
    """

    def __init__(self, config_dir: Path | None = None, config_name: str | None = None) -> None:
        if config_dir is not None and not config_dir.is_dir():
            raise UserError("the configs cannot be read", [Problem("--config-dir", f"there is no folder {config_dir}")])
        self.config_dir = config_dir
        self.extra = [f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []
        self.config_name = config_name or "config"
        self.context = initialize_config_dir(str(CONF_DIR), version_base="1.3", job_name="lora_exp")
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __enter__(self) -> Composer:
        self.context.__enter__()
        self.loader = GlobalHydra.instance().config_loader()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.context.__exit__(kind, error, trace)

    def jobs(self, overrides: list[str], settings: SweepSettings | None = None) -> list[list[str]]:
        """Return the overrides of every job of a grid; of a search, jobs in which each value occurs once.

        Args:
            overrides: The command line's.
            settings: What the config says of the multirun: its own axes, which those of the command line replace.
        """
        params = settings.params if settings else {}
        overrides = [*(f"{key}={value}" for key, value in params.items()), *overrides]
        try:
            parsed = OverridesParser.create().parse_overrides(overrides)
        except OverrideParseException:
            return [overrides]
        drawn = [each for each in parsed if each.is_sweep_override() and not each.is_discrete_sweep()]
        if settings and settings.n_trials is not None:
            return _each_value_once(parsed)
        if drawn:
            self._require_drawing_sweeper(overrides, drawn)
            return _each_value_once(parsed)
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        batches = BasicSweeper.split_arguments([each for each in parsed if not each.is_hydra_override()], None)
        return [list(job) for batch in batches for job in batch]

    def sweep_settings(self, overrides: list[str]) -> SweepSettings:
        """Return what the config says of the multirun as a whole, before any of its jobs is composed.

        Raises:
            UserError: If what says it does not compose.
        """
        own = [
            str(each.input_line)
            for each in parsed_where_possible(overrides)
            if each.key_or_group.split(".")[0].split("/")[0] in SWEEP_KEYS and not each.is_sweep_override()
        ]
        try:
            composed = self._with_hydra(own)
            sweeper, folder = composed.hydra.sweeper, composed.hydra.sweep.dir
        except COMPOSE_ERRORS:
            self.compose(own, check_values=False)
            raise
        return SweepSettings(
            OmegaConf.to_container(composed.sweep),  # type: ignore[arg-type]
            OmegaConf.to_container(sweeper.get("params") or OmegaConf.create({})),  # type: ignore[arg-type]
            sweeper.get("n_trials"),
            self._search(sweeper),
            composed.seed,
            folder,
            dated=composed.sweep.name is None and not any(each.startswith("hydra.sweep.dir=") for each in own),
        )

    @staticmethod
    def _search(sweeper: DictConfig) -> dict[str, Any]:
        """Return what draws the trials of a search."""
        if sweeper.get("n_trials") is None:
            return {}
        resolved = OmegaConf.to_container(sweeper, resolve=True)
        assert isinstance(resolved, dict)
        return {key: resolved[key] for key in ("sampler", "pruner", "storage")}

    def _require_drawing_sweeper(self, overrides: list[str], drawn: list[Override]) -> None:
        """Refuse `interval(...)` and the like where the sweeper only takes lists of values."""
        own = [each for each in overrides if each.startswith("hydra")]
        hydra_config = self._with_hydra(own).hydra
        if hydra_config.sweeper._target_.endswith("BasicSweeper"):
            what = "a grid takes values, not a range to draw from"
            mend = "add hydra/sweeper=optuna, or give values: {}=0.1,0.3,1.0"
            problems = [Problem(each.key_or_group, what, mend.format(each.key_or_group)) for each in drawn]
            raise UserError("the sweep cannot be made", problems)

    def compose(self, overrides: list[str], check_values: bool) -> DictConfig:
        """Return the composed config.

        Raises:
            UserError: Every override that does not fit and, with `check_values`, every value that is wrong.
        """
        try:
            composed: DictConfig | None = self._compose(overrides)
            problems: list[Problem] = []
        except COMPOSE_ERRORS as error:
            composed, problems = self._without_misfits(overrides, error)
        if check_values and composed is not None:
            problems += hydra_problems(parsed_where_possible(overrides)) + check(composed)[1]
        if problems or composed is None:
            raise UserError(f"the config has {count(len(problems), 'problem')}", problems)
        return composed

    def choices(self, overrides: list[str]) -> dict[str, str]:
        """Return the option that is taken from each config group."""
        composed = self._with_hydra(overrides)
        return {group: option for group, option in composed.hydra.runtime.choices.items() if "/" not in group}

    def _with_hydra(self, overrides: list[str]) -> DictConfig:
        """Return the config with Hydra's own settings; composing takes a tenth of a second, so none is repeated."""
        key = tuple(overrides)
        if key not in self._composed:
            self._composed[key] = compose(self.config_name, [*self.extra, *overrides], return_hydra_config=True)
        return self._composed[key]

    def _compose(self, overrides: list[str]) -> DictConfig:
        composed = self._with_hydra(overrides).copy()
        with open_dict(composed):
            del composed["hydra"]
        OmegaConf.resolve(composed.copy())
        return composed

    def _without_misfits(self, overrides: list[str], error: Exception) -> tuple[DictConfig | None, list[Problem]]:
        """Set aside the overrides that do not fit, and compose the rest."""
        problems, parsed = [], []
        for override in overrides:
            try:
                parsed += OverridesParser.create().parse_overrides([override])
            except OverrideParseException as parse_error:
                what = f"is no override: {_grammar(parse_error)}"
                problems.append(Problem(override, what, "write key=value"))
        try:
            self.defaults = self._with_hydra([])
        except COMPOSE_ERRORS as config_error:
            return None, [_problem_of(config_error)]
        keys = flatten(_container(self.defaults))
        choices = [each for each in parsed if self._is_choice(each, keys)]

        found = {str(each.input_line): self._wrong_choice(each) for each in choices}
        fitting = [line for line, problem in found.items() if problem is None]
        problems += [problem for problem in found.values() if problem is not None]
        try:
            keys = flatten(_container(self._compose(fitting)))
        except COMPOSE_ERRORS as choice_error:
            return None, [*problems, _problem_of(choice_error)]
        for each in parsed:
            if each not in choices:
                problem = self._misfit(each, keys, fitting)
                problems += [problem] if problem else []
                fitting += [] if problem else [str(each.input_line)]
        try:
            return self._compose(fitting), problems
        except COMPOSE_ERRORS:
            return None, [*problems, _problem_of(error)]

    def _is_choice(self, override: Override, keys: dict[str, Any]) -> bool:
        """Whether an override picks an option of a group (or means to) rather than setting a value."""
        key = override.key_or_group
        if override.is_hydra_override() or key in self._groups or "/" in key:
            return True
        near = nearest(key, self._groups) if "." not in key and key not in keys else None
        return near is not None and str(override.value()) in self._options(near)

    def _options(self, group: str) -> list[str]:
        """Return a group's options; the loader looks for them in `conf/` only."""
        own = sorted(file.stem for file in (self.config_dir / group).glob("*.yaml")) if self.config_dir else []
        return [*self.loader.get_group_options(group, ObjectType.CONFIG), *own]

    @property
    def _groups(self) -> list[str]:
        groups: list[str] = self.loader.list_groups("")
        return groups

    def _wrong_choice(self, choice: Override) -> Problem | None:
        """Say what is wrong with picking this option of this group, if anything."""
        group, option = choice.key_or_group, choice.value()
        if choice.is_hydra_override() or choice.is_delete():
            return None
        options = self._options(group)
        if not options:
            near = nearest(group, self._groups)
            return Problem(group, "there is no such group", f"did you mean {near}={option}?" if near else "")
        if str(option) not in options and not isinstance(option, list):
            near = nearest(str(option), options)
            mend = f"choose {', '.join(options)}" + (f"; did you mean {group}={near}?" if near else "")
            return Problem(group, f"has no option {'null' if option is None else option}", mend)
        if group not in self.defaults.hydra.runtime.choices and not choice.is_add():
            return Problem(group, "no option of it is chosen by default, so it is added", f"write +{group}={option}")
        return None

    def _misfit(self, override: Override, keys: dict[str, Any], choices: list[str]) -> Problem | None:
        """Say why a value has no place in the composed config, or None where it has; its type is checked later."""
        key = override.key_or_group
        if override.is_add() or override.is_delete():
            try:
                self._compose([*choices, str(override.input_line)])
            except COMPOSE_ERRORS as error:
                return Problem(key, _first_line(error))
            return None
        if key in keys:
            return None
        group, _, name = key.partition(".")
        section = section_of(group, keys)
        if section is not None and name in section.set_elsewhere:
            return not_taken(key, section.set_elsewhere[name])
        elsewhere = options_with(group, name)
        if elsewhere:
            what = f"there is no such key here; it belongs to {' and '.join(elsewhere)}"
            return Problem(key, what, f"add {elsewhere[0]}")
        return Problem(key or str(override.input_line), "there is no such key", _suggestion(key, keys))


def _each_value_once(parsed: list[Override]) -> list[list[str]]:
    """Return jobs in which each value of each axis occurs, an interval by its two ends."""
    own = {each.get_key_element(): each for each in parsed if not each.is_hydra_override()}
    fixed = [str(each.input_line) for each in own.values() if not each.is_sweep_override()]
    axes = {key: _values(each) for key, each in own.items() if each.is_sweep_override()}
    longest = max(map(len, axes.values()), default=1)
    return [
        [*fixed, *(f"{key}={values[number % len(values)]}" for key, values in axes.items() if values)]
        for number in range(longest)
    ]


def _values(axis: Override) -> list[str]:
    value = axis.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    return [str(each) for each in axis.sweep_string_iterator()]


def _suggestion(key: str, keys: dict[str, Any]) -> str:
    """Name the nearest key: in the same group, in the library class behind it, then anywhere by its last part."""
    group, _, name = key.rpartition(".")
    if key.replace("_", ".", 1) in keys:
        return f"did you mean {key.replace('_', '.', 1)}?"
    if isinstance(keys.get(group), dict) and "." in group:
        return f"add it with +{key}=..."
    siblings = {each.rpartition(".")[2]: each for each in keys if each.rpartition(".")[0] == group}
    near = nearest(name, siblings)
    if near:
        return f"did you mean {siblings[near]}?"
    section = section_of(group, keys)
    library_class = section.library_class if section is not None else None
    if library_class is not None:
        fields = library_fields(library_class)
        near = name if name in fields else nearest(name, fields)
        if near:
            return f"{library_class} has {near}; add it with +{group}.{near}=..."
    for option, names in option_keys(group).items():
        if near := nearest(name, names):
            return f"did you mean {group}.{near} of {group}={option}?"
    leaves = {each.rpartition(".")[2]: each for each in reversed(list(keys))}
    near = nearest(name, leaves)
    return f"did you mean {leaves[near]}?" if near else "python -m lora_exp --cfg job prints the keys there are"


def _container(composed: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _grammar(error: OverrideParseException) -> str:
    """Return what Hydra's parser says, less the names of all tokens that it would have taken."""
    line = str(error).splitlines()[0].partition(" expecting {")[0]
    return line.replace("mismatched input '<EOF>'", "it ends too soon")


def _first_line(error: Exception) -> str:
    cause = error.__cause__
    text = str(cause if isinstance(cause, OmegaConfBaseException) else error)
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__)


def _problem_of(error: Exception) -> Problem:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return Problem(f"{mark.name}:{mark.line + 1}", f"is no YAML: {error.problem}", "check brackets and indentation")
    text = str(error).partition("\nConfig search path:")[0]
    return Problem("conf", " ".join(line.strip() for line in text.splitlines() if line.strip()), "")
