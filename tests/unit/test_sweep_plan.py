"""A multirun command is worked out before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.compose import Composer
from lora_exp.errors import UserError
from lora_exp.resolvers import register_resolvers
from lora_exp.sweeps.identity import identity_of
from lora_exp.sweeps.names import LONGEST, safe, trial_name
from lora_exp.sweeps.plan import SweepPlan, quoted
from lora_exp.sweeps.question import Question
from lora_exp.sweeps.start import check_trials, start_sweep

values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4)
configs = st.dictionaries(st.text("abc", min_size=1, max_size=3), values, max_size=6)


@given(st.text("ab'\"\\ ,=[", max_size=8))
def test_a_quoted_path_comes_back_from_hydras_parser(path: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"x={quoted(path)}"])
    assert override.value() == path


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from lora_exp.sweeps import start

    register_resolvers()
    monkeypatch.chdir(tmp_path)
    yield
    for lock in start._held:
        lock.release()
    start._held.clear()


def plan(*overrides: str) -> SweepPlan:
    with Composer() as composer:
        return start_sweep(check_trials(composer, ["tracker=none", *overrides]))


def again(*overrides: str) -> SweepPlan:
    """Plan as the next process would."""
    from lora_exp.sweeps import start

    start._held.pop().release()
    return plan(*overrides)


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        plan(*overrides)
    return str(caught.value)


@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=30, unique=True))
def test_names_are_safe_and_never_shared(names: list[str]) -> None:
    found = [safe(name) for name in names]
    assert len(set(found)) == len(names)
    for name in found:
        assert len(name) <= LONGEST
        assert name.strip(".")
        assert Path(name).name == name


def test_a_trial_is_named_for_its_axes_in_their_order() -> None:
    overrides = ["recipe=dpo", "recipe.max_length=256", "recipe.beta=0.1", "seed=3"]
    assert trial_name(overrides, ["recipe.beta", "recipe.max_length"]) == "recipe.beta=0.1,recipe.max_length=256"
    assert trial_name(overrides, ["model", "seed"], "trainer.max_steps=9") == "seed=3,trainer.max_steps=9"
    assert trial_name(overrides, []) == "trial"


@given(configs, configs)
def test_identity_is_that_of_what_can_change_a_result(first: dict[str, object], second: dict[str, object]) -> None:
    assert (identity_of({"recipe": first}) == identity_of({"recipe": second})) == (
        repr(sorted(first.items())) == repr(sorted(second.items()))
    )
    watched = {"recipe": first, "output_dir": "x", "tracker": second, "sweep": second, "trainer": {"logging_steps": 3}}
    assert identity_of(watched) == identity_of({"recipe": first})


def test_a_command_is_completed_by_what_it_means() -> None:
    found = plan("sweep.name=grid", "recipe=dpo", "recipe.beta=0.1,0.5", "sweep.seeds=3", "seed=7")
    assert found.folder == Path("multirun/grid")
    assert found.axes == ("recipe.beta", "seed")
    assert found.size == 6
    assert "seed=7,8,9" in found.overrides
    assert [each for each in found.overrides if each.startswith("seed=")] == ["seed=7,8,9"]


def test_trials_of_different_lengths_are_evaluated_on_the_same_rows() -> None:
    found = plan("recipe.max_length=128,512,256")
    assert {"recipe.eval_max_length=512", "recipe.eval_max_prompt_length=256"} <= set(found.overrides)
    assert "recipe.eval_max_length=600" in again("recipe.max_length=128,512", "recipe.eval_max_length=600").overrides
    assert not [each for each in again("recipe=dpo", "recipe.beta=0.1,1").overrides if "eval_max" in each]


def test_the_same_question_goes_on_and_takes_further_points() -> None:
    first = plan("sweep.name=grid", "recipe=dpo", "recipe.beta=0.1,0.5")
    same = again("sweep.name=grid", "recipe=dpo", "recipe.beta=0.1,0.5", "tracker.project=other")
    further = again("sweep.name=grid", "recipe=dpo", "recipe.beta=0.3")
    assert first.axes == same.axes == further.axes == ("recipe.beta",)
    assert not [each for each in further.overrides if "variant" in each]


def test_another_question_is_refused_with_what_changed_or_extends_the_sweep() -> None:
    plan("sweep.name=grid", "recipe=dpo", "recipe.beta=0.1,0.5")
    changed = ["sweep.name=grid", "recipe=dpo", "recipe.beta=0.1,0.5", "trainer.max_steps=7"]
    with pytest.raises(UserError, match=r"trainer.max_steps: was -1 in multirun/grid and is 7 now"):
        again(*changed)
    extended = again(*changed, "sweep.on_change=extend")
    assert "sweep.variant='trainer.max_steps=7'" in extended.overrides
    question = Question.read(Path("multirun/grid"))
    assert question is not None
    assert question.common["trainer.max_steps"] == -1


def test_a_sweep_that_is_often_started_again_names_its_command_once() -> None:
    command = ["sweep.name=grid", "recipe=dpo", "recipe.beta=0.1,0.5"]
    plan(*command)
    again(*command)
    question = Question.read(Path("multirun/grid"))
    assert question is not None
    assert len(question.commands) == 1


def test_a_sweep_in_use_is_refused() -> None:
    plan("sweep.name=grid", "recipe.max_length=128,256")
    assert "another command is running this sweep" in refused("sweep.name=grid", "recipe.max_length=128,256")


SEARCH = ["hydra/sweeper=optuna", "recipe=dpo", "recipe.beta=interval(0.1,1)"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["recipe.bta=0.1,0.5"], "recipe.bta: there is no such key"),
        (["hydra/sweeper=basic", "recipe.max_length=range(300,100)"], "holds no value"),
        (["trainer.learning_rate=" + ",".join(f"{n}e-5" for n in range(1, 202))], "sweep.confirm=true"),
        (["sweep.seeds=2", "seed=1,2"], "seed is swept already"),
        (["sweep.name=../elsewhere"], "sweep.name: should be a name for a folder"),
        (["seed=1,2,1"], "seed: 1: the same trial twice"),
        (["recipe=dpo", "recipe.beta=1,1.0"], "recipe.beta: 1 and 1.0: the same trial twice"),
        (["recipe=dpo", "recipe.beta=0.1,"], "is no override: it ends too soon"),
        ([*SEARCH, "hydra.sweeper.storage=mysql://nowhere"], "hydra.sweeper.storage: mysql://nowhere cannot be opened"),
        ([*SEARCH, "+hydra.sweeper.sampler.nonsense=1"], "hydra.sweeper.sampler: "),
        ([*SEARCH, "+hydra.sweeper.pruner.nonsense=1"], "hydra.sweeper.pruner: "),
        ([*SEARCH, "hydra/sweeper/sampler=nonsense"], "options in 'hydra/sweeper/sampler': random tpe"),
        (["sweep.name=.."], "sweep.name"),
        (["quant=4bit,none", "tracker.project=a,b"], "tracker.project: changes no result"),
        (["recipe=dpo", "recipe.discopop_tau=0.1,0.2"], "loss_type=sigmoid does not use it"),
        (["quant=8bit", "+quant.bnb_4bit_quant_type=nf4,fp4"], "only a 4-bit base uses it"),
        (["objective=eval_rewards/margins", "seed=1,2"], "recipe=sft never logs eval_rewards/margins"),
    ],
)
def test_what_is_no_sweep_is_told_before_anything_starts(overrides: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused(*overrides)
    assert not list(tmp_path.iterdir())
