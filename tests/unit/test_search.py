"""A search draws what its axes mean, goes on after a kill as before, and needs fewer steps than a grid."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lora_exp.config import CONF_DIR
from lora_exp.errors import UserError
from lora_exp.search.axes import Axis, axes_of
from lora_exp.search.pruning import SearchTrial
from lora_exp.search.study import Outcome, Search, open_search

TPE = {"_target_": "optuna.samplers.TPESampler", "seed": 2, "n_startup_trials": 8}
MEDIAN = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 3, "n_warmup_steps": 1}
EVALUATIONS = 8


def parse(*overrides: str) -> dict[str, Axis]:
    return axes_of(OverridesParser.create().parse_overrides(list(overrides)))


def settings_of(folder: Path, **other: Any) -> dict[str, Any]:
    storage = f"sqlite:///{folder}/study.sqlite3"
    return {"n_trials": 12, "storage": storage, "study_name": "one", "sampler": TPE, "pruner": MEDIAN, **other}


def search_in(folder: Path, *overrides: str, began: datetime | None = None, **other: Any) -> Search:
    axes = parse(*(overrides or ("x=tag(log,interval(0.01,1))", "y=choice(1,2,3)", "group=a,b")))
    return open_search(settings_of(folder, **other), axes, ["minimize"], began or datetime.now())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("x=interval(0.01,0.5)", FloatDistribution(0.01, 0.5)),
        ("x=interval(1,8)", FloatDistribution(1.0, 8.0)),
        ("x=int(interval(1,8))", IntDistribution(1, 8)),
        ("x=tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("x=tag(log,int(interval(4,64)))", IntDistribution(4, 64, log=True)),
        ("x=range(64,257,64)", IntDistribution(64, 256, step=64)),
        ("x=range(0.0,1.0,0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("x=0.1,sigmoid,true,null", CategoricalDistribution([0.1, "sigmoid", True, None])),
        ("x=4bit,8bit", CategoricalDistribution(["4bit", "8bit"])),
    ],
)
def test_an_axis_is_what_its_syntax_means(override: str, expected: object) -> None:
    assert parse(override)["x"].distribution == expected


@given(st.lists(st.integers(-9, 9) | st.floats(-1e3, 1e3) | st.booleans(), min_size=1, max_size=5, unique_by=repr))
def test_a_drawn_value_comes_back_as_it_was_written(values: list[Any]) -> None:
    written = [repr(value).lower() for value in values]
    axis = parse(f"+x=choice({','.join(written)})")["x"]
    for drawn in axis.distribution.choices:  # type: ignore[attr-defined]
        (again,) = OverridesParser.create().parse_overrides([axis.override(drawn)])
        assert again.is_add()
        assert again.value() in values


def loss(params: Mapping[str, Any], evaluation: int) -> float:
    """Return a surface with one best point, x = 0.1, y = 2, group = b, that a run comes down to step by step."""
    end = (math.log10(params["x"]) + 1) ** 2 + 0.5 * abs(params["y"] - 2) + (0.3 if params["group"] == "a" else 0)
    return end + 2 * 0.5**evaluation


class KilledError(Exception):
    """A process that is no more."""


def work(folder: Path, chance: random.Random | None = None, **other: Any) -> tuple[list[Any], int]:
    """Run a search as the sweeper does, killed at any moment where there is a chance.

    Returns:
        What is in the study in the end, and how many evaluations that took.
    """

    def perhaps_die() -> None:
        if chance is not None and chance.random() < 0.08:
            raise KilledError

    evaluations = 0
    while True:
        try:
            search = search_in(folder, **other)
            while (trial := search.next()) is not None:
                perhaps_die()
                seen = SearchTrial(f"sqlite:///{folder}/study.sqlite3", "one", trial.number, MEDIAN)
                outcome = Outcome("finished", [loss(trial.params, EVALUATIONS - 1)])
                for evaluation in range(EVALUATIONS):
                    evaluations += 1
                    behind = seen.falls_behind(loss(trial.params, evaluation), evaluation)
                    perhaps_die()
                    if behind:
                        outcome = Outcome("pruned", None)
                        break
                search.tell(trial.number, outcome)
                perhaps_die()
        except KilledError:
            continue
        found = [(t.number, t.params, t.state, t.values, t.intermediate_values) for t in search.study.trials]
        return found, evaluations


@pytest.mark.parametrize("seed", [0, 1])
def test_a_search_that_is_killed_ends_as_one_that_is_not(tmp_path: Path, seed: int) -> None:
    undisturbed, _ = work(tmp_path / "undisturbed")
    killed, _ = work(tmp_path / "killed", random.Random(seed))
    assert killed == undisturbed
    assert {state.name for _, _, state, *_ in killed} == {"COMPLETE", "PRUNED"}


def test_pruning_finds_the_best_point_in_less_than_half_of_the_steps_of_a_grid(tmp_path: Path) -> None:
    values = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    grid = [{"x": x, "y": y, "group": group} for x, y, group in itertools.product(values, (1, 2, 3), "ab")]
    best = min(grid, key=lambda params: loss(params, EVALUATIONS - 1))
    axes = (f"x={','.join(map(str, values))}", "y=1,2,3", "group=a,b")
    search = search_in(tmp_path, *axes, n_trials=25)
    steps = 0
    while (trial := search.next()) is not None:
        seen = SearchTrial(f"sqlite:///{tmp_path}/study.sqlite3", "one", trial.number, MEDIAN)
        for evaluation in range(EVALUATIONS):
            steps += 1
            if seen.falls_behind(loss(trial.params, evaluation), evaluation):
                search.tell(trial.number, Outcome("pruned", None))
                break
        else:
            search.tell(trial.number, Outcome("finished", [loss(trial.params, EVALUATIONS - 1)]))
    assert search.results()["best_params"] == best
    assert steps < len(grid) * EVALUATIONS / 2


@pytest.mark.parametrize("file", sorted((CONF_DIR / "hydra/sweeper").glob("*/*.yaml")), ids=lambda file: file.stem)
def test_every_sampler_and_pruner_of_conf_works(tmp_path: Path, file: Path) -> None:
    named = yaml.safe_load(file.read_text())
    if named.get("seed") == "${seed}":
        named["seed"] = 3
    search = search_in(tmp_path, n_trials=6, **{file.parent.name: named})
    while (trial := search.next()) is not None:
        pruner = named if file.parent.name == "pruner" else MEDIAN
        seen = SearchTrial(f"sqlite:///{tmp_path}/study.sqlite3", "one", trial.number, pruner)
        behind = [seen.falls_behind(loss(trial.params, evaluation), evaluation) for evaluation in range(3)]
        search.tell(trial.number, Outcome("pruned" if any(behind) else "finished", [loss(trial.params, 2)]))
    assert len(search.study.trials) == 6


def test_what_failed_is_tried_again_by_the_next_command_and_not_by_this_one(tmp_path: Path) -> None:
    search = search_in(tmp_path, n_trials=2)
    first = search.next()
    assert first is not None
    search.tell(first.number, Outcome("failed", None))
    search.retry_failed()
    second = search.next()
    assert second is not None
    assert second.params != first.params
    search.tell(second.number, Outcome("finished", [1.0]))
    assert search.next() is None

    later = search_in(tmp_path, n_trials=2, began=datetime.now() + timedelta(seconds=1))
    later.retry_failed()
    later.retry_failed()
    again = later.next()
    assert again is not None
    assert again.params == first.params
    later.tell(again.number, Outcome("finished", [0.5]))
    assert later.next() is None
    assert later.results() == {"name": "optuna", "best_params": first.params, "best_value": 0.5}


def test_more_trials_go_on_with_the_study(tmp_path: Path) -> None:
    few, _ = work(tmp_path / "grown", n_trials=4)
    more, _ = work(tmp_path / "grown", n_trials=9)
    at_once, _ = work(tmp_path / "at_once", n_trials=9)
    assert more[:4] == few
    assert more == at_once


def test_several_objectives_end_in_what_no_other_trial_beats(tmp_path: Path) -> None:
    search = open_search(settings_of(tmp_path), parse("x=1,2,3,4"), ["minimize", "maximize"], datetime.now())
    while (trial := search.next()) is not None:
        seen = SearchTrial(f"sqlite:///{tmp_path}/study.sqlite3", "one", trial.number, MEDIAN)
        assert not seen.falls_behind(1e9, 0), "pruning is by one objective"
        x = trial.params["x"]
        search.tell(trial.number, Outcome("finished", [x, -abs(x - 3)]))
    assert {solution["params"]["x"] for solution in search.results()["solutions"]} <= {1, 2, 3}


@pytest.mark.parametrize(
    ("axes", "other", "message"),
    [
        (["x=1,2,3"], {}, "x: CategoricalDistribution does not support dynamic value space"),
        (["x=interval(0,1)"], {}, "x: Cannot set different distribution kind to the same parameter name"),
        (["z=1,2"], {}, "x: was varied by this study and is not any more"),
        (["x=1,2"], {"sampler": {"_target_": "optuna.samplers.TPESampeler"}}, "hydra.sweeper.sampler: "),
        (["x=1,2"], {"pruner": {**MEDIAN, "warmup": 3}}, "hydra.sweeper.pruner: "),
        (["x=1,2"], {"storage": "sqlite:////proc/no/study.sqlite3"}, "hydra.sweeper.storage: "),
    ],
)
def test_what_cannot_be_searched_is_told_with_its_key(
    tmp_path: Path, axes: list[str], other: dict[str, Any], message: str
) -> None:
    trial = search_in(tmp_path, "x=1,2").next()
    assert trial is not None
    with pytest.raises(UserError) as caught:
        search_in(tmp_path, *axes, **other)
    assert message in str(caught.value)


def test_another_direction_is_refused(tmp_path: Path) -> None:
    search_in(tmp_path, "x=1,2")
    with pytest.raises(UserError, match="the study was to minimize, and is to maximize now"):
        open_search(settings_of(tmp_path), parse("x=1,2"), ["maximize"], datetime.now())
