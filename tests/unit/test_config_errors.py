"""A mistake in the config is answered with its place and its mend, all mistakes at once, at once."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
from omegaconf import OmegaConf

from lora_exp.compose import Composer
from lora_exp.config import CONF_DIR, Config, Section
from lora_exp.errors import Problem, UserError
from lora_exp.library_fields import SOURCES, library_fields, nearest
from lora_exp.recipes.dpo import DPO
from lora_exp.recipes.sft import SFT
from lora_exp.rules import Rule, flatten
from lora_exp.tracking.mlflow import MLflow
from lora_exp.tracking.none import NoTracker
from lora_exp.tracking.tensorboard import TensorBoard
from lora_exp.tracking.trackio import Trackio
from lora_exp.tracking.wandb import Wandb
from lora_exp.validation import check

SECTIONS = {
    **{name: [field.annotation] for name, field in Config.model_fields.items() if isinstance(field.annotation, type)},
    "recipe": [SFT, DPO],
    "tracker": [NoTracker, Wandb, TensorBoard, MLflow, Trackio],
}
SECTIONS = {name: [each for each in types if issubclass(each, Section)] for name, types in SECTIONS.items()}


def problems_of(composer: Composer, overrides: list[str]) -> list[Problem]:
    """Return what the command line says of these overrides."""
    with pytest.raises(UserError) as caught:
        composer.compose(overrides, check_values=True)
    assert caught.value.problems
    for problem in caught.value.problems:
        assert str(problem).splitlines()[0] in str(caught.value), "a problem is missing from the message"
    return caught.value.problems


def fine(composer: Composer, overrides: list[str]) -> bool:
    try:
        composer.compose(overrides, check_values=True)
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    ("overrides", "where", "what", "mend"),
    [
        # A key that is nowhere, near one that is.
        (["trainer.max_step=4"], "trainer.max_step", "no such key", "trainer.max_steps"),
        (["recipe.maxlength=64"], "recipe.maxlength", "no such key", "recipe.max_length"),
        (["samples.num_prompt=1"], "samples.num_prompt", "no such key", "samples.num_prompts"),
        (["sed=1"], "sed", "no such key", "seed"),
        # The right name in the wrong place.
        (["max_length=64"], "max_length", "no such key", "recipe.max_length"),
        # A key of another option of the group.
        (["recipe.beta=0.1"], "recipe.beta", "belongs to recipe=dpo", "recipe=dpo"),
        (["data.name=en"], "data.name", "belongs to data=hub", "data=hub"),
        (["data.path=json"], "data.path", "belongs to data=hub", "data=hub"),
        (["+recipe.beta=0.1"], "recipe.beta", "belongs to recipe=dpo", "recipe=dpo"),
        (["tracker=none", "tracker.mode=offline"], "tracker.mode", "belongs to tracker=wandb", "tracker=wandb"),
        # A field of the library that our files do not list.
        (["trainer.adam_beta2=0.98"], "trainer.adam_beta2", "no such key", "+trainer.adam_beta2="),
        (["lora.modules_to_save=[x]"], "lora.modules_to_save", "no such key", "+lora.modules_to_save="),
        (
            ["data=hub", "data.path=json", "data.columns.prompt=ask"],
            "data.columns.prompt",
            "no such key",
            "+data.columns.prompt=",
        ),
        # A plus does not make a name right.
        (["+trainer.typo=1"], "trainer.typo", "transformers.TrainingArguments has no such field", ""),
        (["+trainer.adam_bet2=0.9"], "trainer.adam_bet2", "no such field", "trainer.adam_beta2"),
        (["+lora.modules_to_sav=[x]"], "lora.modules_to_sav", "peft.LoraConfig has no such field", "lora.modules_to_s"),
        (["+model.revison=main"], "model.revison", "no such key", "model.revision"),
        (["+sede=1"], "sede", "no such key", "seed"),
        # Options and groups.
        (["recipe=dop"], "recipe", "no option dop", "recipe=dpo"),
        (["model=smollm2"], "model", "no option smollm2", "model=smollm2_135m"),
        (["quant=16bit"], "quant", "no option 16bit", "4bit, 8bit, none"),
        (["recip=dpo"], "recip", "no such group", "recipe=dpo"),
        (["experiment=demo"], "experiment", "no option demo", "demo_dpo, demo_sft"),
        (["quant=8"], "quant", "no option 8", "8bit"),
        (["recipe=null"], "recipe", "", "dpo, sft"),
        # Types and ranges.
        (["trainer.max_steps=ten"], "trainer.max_steps", "integer, not 'ten'", ""),
        (["trainer.max_steps=4.5"], "trainer.max_steps", "integer, not 4.5", ""),
        (["trainer.bf16=yes_please"], "trainer.bf16", "'auto'", ""),
        (["recipe=dpo", "recipe.beta=0"], "recipe.beta", "greater than 0", ""),
        (["recipe=dpo", "recipe.loss_type=sigmod"], "recipe.loss_type", "not 'sigmod'", ""),
        (["lora.lora_dropout=1.0"], "lora.lora_dropout", "less than 1", ""),
        (["lora.r=0"], "lora.r", "greater than 0", ""),
        (["recipe.truncation_side=top"], "recipe.truncation_side", "'left' or 'right'", ""),
        (["recipe.max_length=ten"], "recipe.max_length", "integer, not 'ten'", ""),
        (["recipe.max_length=null"], "recipe.max_length", "integer, not None", ""),
        (["seed=-1"], "seed", "greater than or equal to 0", ""),
        (["lora.target_modules=[1]"], "lora.target_modules", "string", ""),
        # What has no default.
        (["model=custom"], "model.pretrained_model_name_or_path", "was not given", "model.pretrained_model_name_or_p"),
        (["data=hub"], "data.path", "was not given", "data.path="),
        # What is no override at all.
        (["trainer.max_steps"], "trainer.max_steps", "is no override", "key=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_named_with_its_place_and_its_mend(
    composer: Composer, overrides: list[str], where: str, what: str, mend: str
) -> None:
    (problem,) = problems_of(composer, overrides)
    assert problem.where == where
    assert what in problem.what
    assert mend in problem.mend


MENDED = re.compile(r"\b(?:did you mean|write|add it with|add) (\+?[\w./]+)")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("trainer.max_step=4", "trainer.max_steps=4"),
        ("trainer.adam_beta2=0.98", "+trainer.adam_beta2=0.98"),
        ("recip=dpo", "recipe=dpo"),
        ("data.path=json", "data=hub data.path=json"),
    ],
)
def test_the_mend_that_is_proposed_is_right(composer: Composer, wrong: str, right: str) -> None:
    (problem,) = problems_of(composer, [wrong])
    proposed = MENDED.search(problem.mend)
    assert proposed is not None, problem.mend
    assert proposed.group(1) in [each.partition("=")[0] for each in right.split()]
    assert fine(composer, right.split())


SET_ELSEWHERE = [(group, section) for group, types in SECTIONS.items() for section in types if section.set_elsewhere]


@pytest.mark.parametrize(("group", "section"), SET_ELSEWHERE, ids=[section.__name__ for _, section in SET_ELSEWHERE])
def test_what_is_set_elsewhere_is_refused_with_the_place_where_it_is_set(
    composer: Composer, group: str, section: type[Section]
) -> None:
    chosen = ["recipe=dpo"] if section is DPO else []
    keys = [key for key in section.set_elsewhere if key not in section.model_fields]
    assert keys
    for plus in ("+", ""):
        problems = problems_of(composer, [*chosen, *(f"{plus}{group}.{key}=true" for key in keys)])
        told = {each.where: f"{each.what} {each.mend}" for each in problems}
        assert told.keys() == {f"{group}.{key}" for key in keys}
        for key in keys:
            assert section.set_elsewhere[key].removeprefix("nothing: ") in told[f"{group}.{key}"]


# Rules between keys: each example breaks one rule and no other.

BREAKING_EXAMPLES = [
    ["objective=[eval_loss,train_loss]", "direction=minimize"],
    ["lora=pissa", "quant=8bit"],
    ["trainer.bf16=true", "trainer.fp16=true"],
    ["trainer.max_steps=0"],
    ["recipe.eval_max_length=100"],
    ["data=splits", "data.train_file=mine.jsonl", "trainer.eval_strategy=no", "objective=eval_loss"],
    ["trainer.fp16=true", "trainer.bf16=false", "trainer.use_cpu=true"],
    ["trainer.fp16=true", "trainer.bf16=false", "device=cpu"],
    ["device=cuda", "trainer.use_cpu=true"],
    ["trainer.eval_strategy=steps"],
    ["trainer.load_best_model_at_end=true", "trainer.eval_strategy=no", "trainer.save_strategy=best"],
    ["trainer.load_best_model_at_end=true", "trainer.save_strategy=no"],
    ["trainer.load_best_model_at_end=true", "trainer.save_strategy=steps"],
    [
        "trainer.load_best_model_at_end=true",
        "trainer.save_strategy=steps",
        "trainer.eval_strategy=steps",
        "trainer.save_steps=50",
        "trainer.eval_steps=20",
    ],
    ["data.chat_template_path=mine.jinja", "data.chat_template=false"],
    ["data=splits"],
    ["data=splits", "data.train_file=mine.jsonl"],
    ["data=splits", "data.train_file=mine.jsonl", "trainer.eval_strategy=no", "trainer.eval_on_start=true"],
    ["recipe.max_length=64", "recipe.max_prompt_length=64"],
    ["recipe=dpo", "recipe.loss_type=robust", "recipe.label_smoothing=0.5"],
    ["recipe=dpo", "recipe.loss_type=exo_pair"],
    ["recipe=dpo", "recipe.loss_type=[sigmoid,sft]", "recipe.loss_weights=[1.0]"],
    ["recipe=dpo", "recipe.loss_type=nca_pair", "recipe.f_divergence_type=forward_kl"],
    ["recipe=dpo", "recipe.loss_type=aot", "recipe.use_weighting=true"],
    ["recipe=dpo", "recipe.loss_type=[sigmoid,sft]", "recipe.use_weighting=true"],
    ["recipe=dpo", "+recipe.sync_ref_model=true"],
]


def all_rules() -> list[Rule]:
    """Return the rules of every table, as they stand there."""
    tables = [Config.rules, *(section.rules for types in SECTIONS.values() for section in types)]
    return list(dict.fromkeys(rule for table in tables for rule in table))


RULES = all_rules()
rule_ids = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.keys[0]} {rule.what[:40]}")


@pytest.fixture(scope="module")
def examples() -> list[tuple[list[str], dict[str, Any], list[Problem]]]:
    """Compose and check each example once: its overrides, its values and its problems."""
    found = []
    with Composer() as composer:
        for overrides in BREAKING_EXAMPLES:
            composed = composer.compose(overrides, check_values=False)
            values = flatten(OmegaConf.to_container(composed, resolve=True))
            found.append((overrides, values, check(composed)[1]))
    return found


@rule_ids
def test_each_rule_has_an_example_that_breaks_it_alone_and_is_named_with_its_values(rule: Rule, examples: Any) -> None:
    found = [(values, problems) for _, values, problems in examples if rule.mend in [each.mend for each in problems]]
    assert found, "no example in BREAKING_EXAMPLES breaks this rule"
    for values, problems in found:
        expected = rule.what.format(*(values.get(key) for key in rule.keys))
        assert problems == [Problem(rule.keys[0], expected, rule.mend)]


def test_each_example_breaks_a_rule(composer: Composer, examples: Any) -> None:
    assert all(problems for _, _, problems in examples)
    overrides, _, problems = examples[0]
    assert problems_of(composer, overrides) == problems


def mends_of(rule: Rule) -> Iterator[list[str]]:
    """Yield each set of overrides that a rule's mend proposes; the words between them are left out."""
    for alternative in re.split(r",? or |, |: ", rule.mend):
        overrides = re.findall(r"\+?[\w.]+=\S+", alternative)
        if overrides and not any("..." in each for each in overrides):
            yield overrides


MENDS = [(rule, mend) for rule in RULES for mend in mends_of(rule)]


@pytest.mark.parametrize(("rule", "mend"), MENDS, ids=[" ".join(mend) for _, mend in MENDS])
def test_the_mend_of_a_rule_mends_it(composer: Composer, rule: Rule, mend: list[str], examples: Any) -> None:
    overrides = next(each for each, _, problems in examples if rule.mend in [problem.mend for problem in problems])
    mended = {each.partition("=")[0]: each for each in [*overrides, *mend]}
    assert fine(composer, list(mended.values()))


def test_most_rules_propose_overrides() -> None:
    assert all(rule.mend for rule in RULES)
    assert len({rule for rule, _ in MENDS}) > len(RULES) / 2


# Several at once.


def test_all_mistakes_are_named_in_one_message(composer: Composer) -> None:
    overrides = [
        "recipe=dpo",
        "quant=16bit",
        "recip=dpo",
        "trainer.max_step=4",
        "recipe.beta=-1",
        "lora.r=many",
        "+trainer.typo=1",
        "+trainer.seed=3",
        "trainer.bf16=true",
        "trainer.fp16=true",
        "recipe.loss_weights=[1.0,2.0]",
        "model=custom",
    ]
    problems = problems_of(composer, overrides)
    assert sorted(problem.where for problem in problems) == sorted(
        [
            "quant",
            "recip",
            "trainer.max_step",
            "recipe.beta",
            "lora.r",
            "trainer.typo",
            "trainer.seed",
            "trainer.bf16",
            "recipe.loss_weights",
            "model.pretrained_model_name_or_path",
        ]
    )


def test_the_title_counts_the_problems(composer: Composer) -> None:
    with pytest.raises(UserError, match=r"the config has 1 problem\n"):
        composer.compose(["lora.r=0"], check_values=True)
    with pytest.raises(UserError, match=r"the config has 2 problems\n"):
        composer.compose(["lora.r=0", "seed=-1"], check_values=True)


def test_a_wrong_type_hides_only_the_rules_about_its_key(composer: Composer) -> None:
    problems = problems_of(
        composer, ["trainer.max_steps=ten", "trainer.bf16=true", "trainer.fp16=true", "recipe.max_prompt_length=512"]
    )
    assert {problem.where for problem in problems} == {"trainer.max_steps", "trainer.bf16", "recipe.max_prompt_length"}


def test_a_value_that_others_are_computed_from_does_not_hide_the_rest(composer: Composer) -> None:
    problems = problems_of(composer, ["recipe.max_length=ten", "lora.r=0"])
    assert {"recipe.max_length", "lora.r"} <= {problem.where for problem in problems}


@pytest.mark.parametrize(
    "overrides",
    [
        ["samples=3"],
        ["model.pretrained_model_name_or_path="],
        ["model.fetch=x"],
        ["tracker.tags=x"],
    ],
    ids=" ".join,
)
def test_a_message_is_a_sentence_about_keys_and_not_about_the_program(composer: Composer, overrides: list[str]) -> None:
    (problem,) = problems_of(composer, overrides)
    assert problem.where == overrides[0].partition("=")[0]
    assert str(problem).count("should") <= 1
    assert "instance of" not in problem.what
    assert not re.search("|".join(each.__name__ for types in SECTIONS.values() for each in types), problem.what)


# Properties over all keys.


def leaves(annotation: Any) -> set[Any]:
    """Return the types and literals that an annotation is a union of."""
    arguments = get_args(annotation)
    if not arguments:
        return {annotation}
    if get_origin(annotation) is Literal:
        return set(arguments)
    return {leaf for argument in arguments for leaf in leaves(argument)}


@pytest.mark.parametrize("overrides", [["recipe=sft"], ["recipe=dpo"]], ids=" ".join)
def test_text_is_refused_wherever_a_number_or_a_switch_belongs(composer: Composer, overrides: list[str]) -> None:
    composed = OmegaConf.create(OmegaConf.to_container(composer.compose(overrides, check_values=True), resolve=True))
    config, _ = check(composed)
    given = flatten(OmegaConf.to_container(composed))
    tried, accepted = 0, []
    for name in Config.model_fields:
        section = getattr(config, name)
        for key, field in type(section).model_fields.items() if isinstance(section, Section) else ():
            place = f"{name}.{key}"
            if place not in given or not leaves(field.annotation) <= {int, float, bool, NoneType, "auto"}:
                continue
            wrong = composed.copy()
            OmegaConf.update(wrong, place, "nonsense")
            tried += 1
            if place not in [problem.where for problem in check(wrong)[1]]:
                accepted.append(place)
    assert not accepted
    assert tried > 25


@pytest.mark.parametrize("public_name", SOURCES)
def test_a_wrong_key_names_the_nearest_right_one(public_name: str) -> None:
    fields = library_fields(public_name)
    assert len(fields) > 5
    for name in fields:
        assert nearest(name, fields) == name
        if len(name) > 5:
            assert nearest(f"{name[:-1]}", fields) is not None
    assert nearest("qqqqqqqqqqqq", fields) is None


@pytest.mark.parametrize("public_name", [name for name in SOURCES if not name.startswith("trl.")])
def test_the_fields_read_from_source_are_those_that_the_class_takes(public_name: str) -> None:
    package, _, class_name = public_name.partition(".")
    library_class = getattr(importlib.import_module(package), class_name)
    taken = set(inspect.signature(library_class).parameters)
    if dataclasses.is_dataclass(library_class):
        own = {name for name in library_class.__annotations__ if name in taken}
    else:
        own = taken
    assert own <= library_fields(public_name) | {"kwargs"}
    assert library_fields(public_name) <= taken


# The command itself: exit status 2, no traceback, no torch, within a second.


MISTAKES = [
    (["trainer.max_step=4"], "did you mean trainer.max_steps?"),
    (["recipe=dpo", "recipe.beta=big", "lora.r=0", "+trainer.typo=1"], "the config has 3 problems"),
    (["model=custom"], "model.pretrained_model_name_or_path"),
    (["lora=pissa", "quant=4bit"], "use quant=none"),
    (["-m", "recipe=dpo", "recipe.beta=0.1,-1"], "recipe.beta"),
    (["resume=nowhere"], "there is no folder nowhere"),
    (["--config-dir", "nowhere"], "nowhere"),
    (["--config-name", "nowhere"], "nowhere"),
    (["-m", "recipe=dpo", "recipe.beta=interval(0.1,1)"], "recipe.beta"),
]
TRACKERS = {"mlflow": MLflow, "tensorboard": TensorBoard, "trackio": Trackio}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_whose_package_is_missing_is_told_with_its_install(
    composer: Composer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tracker: str
) -> None:
    assert fine(composer, [f"tracker={tracker}"])
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("no_such_module", "only_a_folder"):
        monkeypatch.setattr(TRACKERS[tracker], "package", (module, tracker))
        (problem,) = problems_of(composer, [f"tracker={tracker}"])
        assert problem.where == "tracker"
        assert module in problem.what
        assert problem.mend == f"pip install 'lora_exp[{tracker}]'"


def test_each_extra_that_a_message_names_is_one() -> None:
    packages = [each.package for types in SECTIONS.values() for each in types if each.package]
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for module, extra in packages:
        assert re.search(rf'^{extra} = \["{module}', text, re.MULTILINE)
    assert len(packages) == len(TRACKERS)


CPU_LIMIT_S = 1.5
"""The promise is one second; the rest is for slow machines."""

TIMES_HYDRA = 4
"""On a machine that is slower still: the limit as a multiple of what Hydra alone takes to compose the same config."""

HYDRA_ALONE = """
import resource
import subprocess
import sys
import hydra
hydra.main(version_base="1.3", config_path=sys.argv.pop(1), config_name="config")(lambda config: None)()
"""


@cache
def hydra_seconds() -> float:
    """Return the CPU seconds that `--cfg job` takes without this project's code, the least of three runs."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-X", "importtime", "-c", HYDRA_ALONE, str(CONF_DIR), "--cfg", "job"]
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


def require_fast(command: Callable[..., Any], arguments: list[str], seconds: float) -> None:
    """Require the limit of the least of three runs: whatever else a machine does can only add to a run's CPU time."""
    limit = CPU_LIMIT_S
    for _ in range(2):
        if seconds >= limit:
            seconds = min(seconds, command(*arguments).cpu_seconds)
            limit = max(limit, TIMES_HYDRA * hydra_seconds())
    sys.stdout.write(f"{seconds:.2f} s of CPU time\n")
    assert seconds < limit


@pytest.mark.parametrize(
    ("arguments", "said"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_ends_with_status_2_and_no_traceback_before_torch_is_imported(
    command: Callable[..., Any], tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = command(*arguments)
    assert done.status == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not done.heavy_imports
    require_fast(command, arguments, done.cpu_seconds)
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--help"], "Groups and their options"), (["--cfg", "job", "recipe=dpo"], "beta: 0.1")],
    ids=["--help", "--cfg job"],
)
def test_help_and_the_composed_config_are_printed_without_torch(
    command: Callable[..., Any], tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = command(*arguments)
    assert done.status == 0, done.stderr
    assert said in done.stdout
    assert not done.heavy_imports
    require_fast(command, arguments, done.cpu_seconds)
    assert not list(tmp_path.iterdir())


def test_help_lists_every_option_with_what_it_is(command: Callable[..., Any]) -> None:
    lines = [line.split() for line in command("--help").stdout.splitlines()]
    described = {words[0] for words in lines if len(words) > 3}
    files = [each for each in CONF_DIR.glob("*/*.yaml") if each.parent.name != "hydra" and each.stem != "base"]
    assert len(files) > 25
    assert {file.stem for file in files} <= described


def test_a_folder_that_holds_a_run_is_refused_before_hydra_writes_to_it(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text('{"status": "finished"}', encoding="utf-8")
    done = command(f"output_dir={tmp_path}")
    assert done.status == 2
    assert f"resume={tmp_path}" in done.stderr
    assert {each.name for each in tmp_path.iterdir()} - {".lock"} == {"run.json"}
