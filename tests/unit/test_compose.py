"""Every file under conf/ composes into a run that passes the check, and every key of it is used by someone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError

from lora_exp.compose import Composer
from lora_exp.config import CONF_DIR, Config, Section
from lora_exp.library_fields import library_fields
from lora_exp.recipes.dpo import DPO
from lora_exp.recipes.sft import SFT
from lora_exp.validation import check
from tests.runs import composed

FILES = sorted(CONF_DIR.rglob("*.yaml"))
NO_CHOICE = {"model/base.yaml"}
"""Files that others are made of and nobody picks."""
REQUIRED = {
    "model/custom.yaml": ["model.pretrained_model_name_or_path=my_models/one"],
    "data/splits.yaml": ["data.splits_dir=my_rows"],
    "data/hub.yaml": ["data.path=json", "data.data_files={train: a.jsonl, test: b.jsonl}"],
}
"""What some options leave to the user."""
SHOWN_COMMANDS = [
    ["recipe=dpo", "quant=8bit"],
    ["recipe=dpo", "quant=4bit", "model=smollm2_135m", "trainer.max_steps=4"],
]


def name_of(file: Path) -> str:
    return file.relative_to(CONF_DIR).as_posix()


def overrides_for(file: Path) -> list[str]:
    """Return the overrides that pick a file of conf/."""
    if file == CONF_DIR / "config.yaml":
        return []
    group = file.parent.relative_to(CONF_DIR).as_posix()
    sweeper = ["hydra/sweeper=optuna"] if group.startswith("hydra/sweeper/") else []
    return [*sweeper, f"{group}={file.stem}", *REQUIRED.get(name_of(file), [])]


def is_picked(name: str) -> bool:
    """Whether a user picks a file of conf/; Hydra's own defaults name the other files under hydra/."""
    return name not in NO_CHOICE and (not name.startswith("hydra/") or name.startswith("hydra/sweeper/"))


PICKED = [file for file in FILES if is_picked(name_of(file))]
RUNS = [*map(overrides_for, PICKED), *SHOWN_COMMANDS]
run_ids = pytest.mark.parametrize("overrides", RUNS, ids=lambda overrides: " ".join(overrides) or "no overrides")


@cache
def composed_with_hydra(overrides: tuple[str, ...]) -> DictConfig:
    with Composer():
        return hydra.compose("config", list(overrides), return_hydra_config=True)


def compose(overrides: list[str]) -> DictConfig:
    whole = composed_with_hydra(tuple(overrides))
    return OmegaConf.masked_copy(whole, [key for key in whole if key != "hydra"])


def files_reached(overrides: list[str]) -> set[str]:
    choices = composed_with_hydra(tuple(overrides)).hydra.runtime.choices
    return {f"{group}/{option}.yaml" for group, option in choices.items() if option is not None}


@run_ids
def test_every_choice_composes_into_a_run_that_passes_the_check(overrides: list[str]) -> None:
    config, problems = check(compose(overrides))
    assert not problems
    assert config is not None


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=3", "recipe=dpo", "recipe.beta=0.3", "quant=4bit", "+lora.use_qalora=false", "lora=dora"],
        ["experiment=demo_sft", "trainer.max_steps=2", "output_dir=here", "~trainer.optim"],
        ["data=hub", "data.path=json", "+data.data_files.train=x.jsonl", "lora.target_modules=[q_proj]"],
    ],
    ids=str,
)
def test_the_tests_compose_as_hydra_does(overrides: list[str]) -> None:
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3", job_name="lora_exp"):
        expected = hydra.compose("config", overrides)
    for _ in range(2):  # what is remembered stays as it was
        found = composed(overrides)
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(expected)
        with pytest.raises(ConfigAttributeError):
            found.nothing = 1


def test_every_file_of_conf_is_reached_by_a_run_above() -> None:
    reached = {"config.yaml"}.union(*(files_reached(overrides) for overrides in RUNS))
    assert {name_of(file) for file in FILES} - reached == NO_CHOICE
    assert len(PICKED) > 25


def sections_of(config: Config) -> Iterator[tuple[str, Section]]:
    for name in Config.model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            yield name, value


def keys_of(section: type[Section]) -> set[str]:
    return {field.alias or name for name, field in section.model_fields.items()}


@run_ids
def test_every_key_is_a_field_of_its_section_or_of_the_library_class_behind_it(overrides: list[str]) -> None:
    composed = compose(overrides)
    config, _ = check(composed)
    assert config is not None
    given_sections = dict(sections_of(config))
    unused = [key for key in composed if key not in Config.model_fields]
    for name, section in given_sections.items():
        library = library_fields(section.library_class) if section.library_class else frozenset()
        unused += [f"{name}.{key}" for key in composed[name] if key not in keys_of(type(section)) | library]
    assert not unused
    assert set(given_sections) == {
        name for name, value in OmegaConf.to_container(composed).items() if isinstance(value, dict)
    }


LIBRARY_SECTIONS = [*(field.annotation for field in Config.model_fields.values()), SFT, DPO]
LIBRARY_SECTIONS = [each for each in LIBRARY_SECTIONS if getattr(each, "library_class", None)]


def inherited_by_trl(public_name: str) -> frozenset[str]:
    """Return the fields that TRL's configs take from a base class in a file of its own."""
    if not public_name.startswith("trl."):
        return frozenset()
    import ast
    import importlib.util

    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "trainer" / "base_config.py").read_text(encoding="utf-8"))
    return frozenset(
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )


@pytest.mark.parametrize("section", LIBRARY_SECTIONS, ids=lambda section: section.__name__)
def test_a_key_that_sets_a_librarys_argument_has_the_librarys_name(section: type[Section]) -> None:
    ours = getattr(section, "own_keys", {"target"})
    assert section.library_class is not None
    theirs = library_fields(section.library_class) | inherited_by_trl(section.library_class)
    assert set(section.model_fields) - ours <= theirs


@pytest.mark.parametrize("section", LIBRARY_SECTIONS, ids=lambda section: section.__name__)
def test_what_is_set_elsewhere_is_no_key_of_the_section(section: type[Section]) -> None:
    assert not set(section.set_elsewhere) & set(section.model_fields)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"recipe.name": "sft", "model.embedded.config.model_type": "llama", "quant.target": None}),
        (["recipe=dpo"], {"recipe.name": "dpo", "recipe.needs_reference": True}),
        (["recipe=dpo", "recipe.beta=0.5"], {"recipe.beta": 0.5}),
        (["recipe=dpo", "recipe.beta=1"], {"recipe.beta": 1.0}),
        (["quant=8bit"], {"quant.load_in_8bit": True, "quant.load_in_4bit": False}),
        (["quant=4bit"], {"quant.load_in_8bit": False, "quant.load_in_4bit": True}),
        (["recipe.learning_rate=0.25"], {"trainer.learning_rate": 0.25}),
        (["recipe.learning_rate=0.25", "trainer.learning_rate=0.5"], {"trainer.learning_rate": 0.5}),
        (["experiment=demo_dpo"], {"recipe.name": "dpo", "trainer.use_cpu": True, "tracker.label": "none"}),
        (["experiment=demo_dpo", "recipe=sft"], {"recipe.name": "sft", "trainer.use_cpu": True}),
        (["lora=dora", "lora.r=4"], {"lora.use_dora": True, "lora.r": 4}),
        (["lora.target_modules=[q_proj,v_proj]"], {"lora.target_modules": ["q_proj", "v_proj"]}),
        (["+trainer.adam_beta2=0.98"], {"trainer.adam_beta2": 0.98}),
        (["+data.columns.prompt=ask"], {"data.columns": {"prompt": "ask"}}),
        (["recipe.max_prompt_length=null"], {"recipe.max_prompt_length": None}),
        (["recipe.max_length=64", "recipe.max_prompt_length=60"], {"recipe.max_prompt_length": 60}),
        (["output_dir=here"], {"output_dir": "here", "resume": None}),
        (["resume=there"], {"output_dir": "there"}),
        (["resume=there", "output_dir=here"], {"output_dir": "here"}),
        (["trainer.bf16=auto"], {"trainer.bf16": "auto"}),
        (["trainer.bf16=false"], {"trainer.bf16": False}),
    ],
    ids=lambda value: " ".join(value) or "no overrides" if isinstance(value, list) else "",
)
def test_overrides_give_these_values(composer: Composer, overrides: list[str], expected: dict[str, Any]) -> None:
    config, problems = check(composer.compose(overrides, check_values=True))
    assert not problems
    for key, value in expected.items():
        found: Any = config
        for part in key.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert found == value, key


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(max_length=st.integers(2, 200_000))
def test_the_prompt_may_take_half_of_max_length(composer: Composer, recipe: str, max_length: int) -> None:
    composed = composer.compose([f"recipe={recipe}", f"recipe.max_length={max_length}"], check_values=True)
    assert composed.recipe.max_prompt_length == max_length // 2


def test_a_grid_becomes_one_job_for_each_combination_and_all_pass(composer: Composer) -> None:
    jobs = composer.jobs(["recipe=dpo", "recipe.beta=0.05,0.1,0.5", "recipe.max_length=128,256"])
    found = [composer.compose(job, check_values=True).recipe for job in jobs]
    assert sorted((each.beta, each.max_length) for each in found) == sorted(product((0.05, 0.1, 0.5), (128, 256)))
    assert all(each.max_prompt_length == each.max_length // 2 for each in found)


def test_one_wrong_job_of_a_grid_is_found(composer: Composer) -> None:
    jobs = composer.jobs(["recipe=dpo", "recipe.beta=0.1,-1"])
    fine, wrong = (check(composer.compose(job, check_values=False))[1] for job in jobs)
    assert not fine
    assert [problem.where for problem in wrong] == ["recipe.beta"]


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """Make a folder for --config-dir with an experiment in it."""
    folder = tmp_path / "mine"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "night.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /recipe: dpo\n\nrecipe:\n  beta: 0.75\nseed: 7\n",
        encoding="utf-8",
    )
    return folder


def test_an_experiment_from_a_folder_of_ones_own_composes(own_folder: Path) -> None:
    with Composer(own_folder) as composer:
        config, problems = check(composer.compose(["experiment=night"], check_values=True))
    assert not problems
    assert config is not None
    assert (config.recipe.name, config.recipe.beta, config.seed) == ("dpo", 0.75, 7)


def test_the_command_line_takes_a_folder_of_ones_own(own_folder: Path, command: Any) -> None:
    done = command("--config-dir", str(own_folder), "experiment=night", "--cfg", "job")
    assert done.status == 0, done.stderr
    assert OmegaConf.create(done.stdout).recipe.beta == 0.75
