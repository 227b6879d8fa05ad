"""From a composed config to a typed one, or to everything that is wrong with it at once.

Imports nothing heavy: every config error answers before torch is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from lora_exp.config import CONF_DIR, MISSING, Config, Section
from lora_exp.errors import Problem, UserError, count
from lora_exp.library_fields import library_fields, nearest
from lora_exp.rules import Rule, broken_rules, flatten
from lora_exp.secrets.refusal import secret_problems


def validate(composed: DictConfig) -> Config:
    """Turn a composed config into a `Config`.

    Raises:
        UserError: Every wrong key, type and option, every value that is missing and every broken rule, together.
    """
    config, problems = check(composed)
    if config is None or problems:
        raise UserError(f"the config has {count(len(problems), 'problem')}", problems)
    return config


def check(composed: DictConfig) -> tuple[Config | None, list[Problem]]:
    """Return the typed config, or None and every problem that was found."""
    raw = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(raw, dict)
    values = flatten({str(key): value for key, value in raw.items()})
    missing = [key for key, value in values.items() if value == MISSING]
    problems = secret_problems(OmegaConf.to_container(composed))  # type: ignore[arg-type]
    secret = [problem.where for problem in problems]  # nothing else is said of them, which might repeat a value
    problems += [Problem(key, "has no default and was not given", f"add {key}=...") for key in missing]

    sections: dict[str, Any] = {}
    rules: list[Rule] = list(Config.rules)
    invalid = {*missing, *secret}
    section_types = {name: field.annotation for name, field in Config.model_fields.items()}
    for name in ("recipe", "engine", "tracker"):
        section_types[name] = _named_class(raw.get(name), name, problems)
    for name, section_type in section_types.items():
        if not (isinstance(section_type, type) and issubclass(section_type, Section)):
            continue
        rules += section_type.rules
        problems += _missing_package(name, section_type)
        try:
            sections[name] = section_type.model_validate(raw.get(name))
        except ValidationError as error:
            found = _problems_of(error, section_type, name, skip=invalid)
            problems += found
            invalid |= {problem.where for problem in found}
        problems += _unknown_to_library(name, sections.get(name))
    # A section that is wrong has been reported; an empty one in its place lets the rest of the root be checked.
    stand_ins = {
        name: section_type.model_construct()
        for name, section_type in section_types.items()
        if isinstance(section_type, type) and issubclass(section_type, Section) and name not in sections
    }
    config: Config | None = None
    try:
        config = Config.model_validate({**raw, **stand_ins, **sections})
    except ValidationError as error:
        found = _problems_of(error, Config, "", skip=invalid)
        problems += found
        invalid |= {problem.where for problem in found}
    problems = _without_echoes(problems, composed)
    problems += broken_rules(rules, values, invalid)
    problems += _unknown_objective(raw.get("objective"), sections.get("recipe"))
    return (None if problems else config), problems


def _missing_package(group: str, section: type[Section]) -> list[Problem]:
    """Check that what does a section's work is installed; nothing is imported."""
    if section.package is None:
        return []
    module, extra = section.package
    found = importlib.util.find_spec(module)
    if found is not None and found.origin is not None:  # without one it is a folder that has the same name
        return []
    return [Problem(group, f"the package {module} is not installed", f"pip install 'lora_exp[{extra}]'")]


def _without_echoes(problems: list[Problem], composed: DictConfig) -> list[Problem]:
    """Leave out keys whose wrong value comes from another key that is told already."""

    def follows(key: str) -> bool:
        group, _, name = key.rpartition(".")
        section = OmegaConf.select(composed, group) if group else composed
        return isinstance(section, DictConfig) and name in section and OmegaConf.is_interpolation(section, name)

    sources = [problem for problem in problems if not follows(problem.where)]
    return sources or problems


def _unknown_objective(objective: Any, recipe: Any) -> list[Problem]:
    """Check that the recipe logs what is to be compared."""
    given = objective if isinstance(objective, list) else [objective]
    problems = []
    for name in given:
        if not isinstance(name, str) or recipe is None or name in recipe.final_metrics():
            continue
        names = sorted(recipe.final_metrics())
        near = nearest(name, names)
        mend = f"did you mean {near}?" if near else f"choose one of {', '.join(names)}"
        problems.append(Problem("objective", f"recipe={recipe.name} never logs {name}", mend))
    return problems


def without_effect(composed: DictConfig, axes: Sequence[str]) -> list[Problem]:
    """Return the keys of `axes` whose value changes nothing in this config.

    Args:
        composed: A config that passes the check.
        axes: Keys that a sweep varies.
    """
    raw = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(raw, dict)
    values = flatten({str(key): value for key, value in raw.items()})
    sections: list[Any] = [field.annotation for field in Config.model_fields.values()]
    sections += [_named_class(raw[name], name, []) for name in ("recipe", "engine", "tracker")]
    rules = [rule for section in sections for rule in getattr(section, "unused", ()) if rule.keys[0] in axes]
    return broken_rules(rules, values, set())


def _named_class(raw: Any, name: str, problems: list[Problem]) -> type[Section] | None:
    """Import the class that a group's `_target_` names."""
    path = raw.get("_target_") if isinstance(raw, Mapping) else None
    try:
        module, _, attribute = str(path).rpartition(".")
        named: type[Section] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        problems.append(
            Problem(f"{name}._target_", f"{path} is no class that can be imported", f"choose a {name}= option")
        )
        return None
    return named


def _problems_of(error: ValidationError, section: type[Section], prefix: str, skip: set[str]) -> list[Problem]:
    """Translate pydantic's findings into keys, sentences and mends."""
    problems: list[Problem] = []
    aliases = {field.alias: name for name, field in section.model_fields.items() if field.alias}
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        # Members of a union ("bool", "literal['auto']") stand behind the key in the place; a key is enough.
        key = ".".join([prefix, *parts[:1]]).strip(".")
        if key in skip or any(problem.where == key for problem in problems):
            continue
        known = [name for name in section.model_fields if name not in aliases.values()]
        if item["type"] == "extra_forbidden":
            near = nearest(parts[-1], known)
            problems.append(Problem(key, "there is no such key", f"did you mean {prefix}.{near}?" if near else ""))
        elif item["type"] == "missing":
            problems.append(Problem(key, "is not set", f"add {key}=..."))
        else:
            problems.append(Problem(key, _sentence(error, item, parts[0] if parts else ""), ""))
    return problems


def _sentence(error: ValidationError, item: Any, field: str) -> str:
    """Say what was expected, over all members of a union, and what was given."""
    same = [other for other in error.errors() if other["loc"][:1] == item["loc"][:1]]
    if any(other["type"] == "string_too_short" for other in same):
        return "is empty"
    own = [other["msg"].removeprefix("Value error, ") for other in same if other["type"] == "value_error"]
    expected = own or [_expected(other) for other in same]
    given = item["input"] if not field or len(item["loc"]) <= 1 else same[0]["input"]
    return f"should be {' or '.join(dict.fromkeys(expected))}, not {given!r}"


def _expected(item: Any) -> str:
    """Return the noun of pydantic's `Input should be a valid integer`, in the words of a config file."""
    if item["type"] in ("model_type", "dict_type", "mapping_type"):
        return "a group of keys"
    if item["type"] == "too_short":
        return "a list that is not empty"
    message: str = item["msg"]
    return message.removeprefix("Input should be ").removeprefix("a valid ")


def _unknown_to_library(group: str, section: Section | None) -> list[Problem]:
    """Check keys beyond our own against the fields of the library class behind the group."""
    extra = (section.model_extra or {}) if section is not None else {}
    if section is None or not extra:
        return []
    assert section.library_class is not None
    fields = library_fields(section.library_class)
    problems: list[Problem] = []
    for key in extra:
        if key in section.set_elsewhere:
            problems.append(not_taken(f"{group}.{key}", section.set_elsewhere[key]))
        elif key not in fields and (elsewhere := options_with(group, key)):
            what = f"there is no such key here; it belongs to {' and '.join(elsewhere)}"
            problems.append(Problem(f"{group}.{key}", what, f"add {elsewhere[0]}"))
        elif key not in fields:
            near = nearest(key, fields)
            mend = f"did you mean {group}.{near}?" if near else ""
            problems.append(Problem(f"{group}.{key}", f"{section.library_class} has no such field", mend))
    return problems


def not_taken(key: str, instead: str) -> Problem:
    """Say of a key what `Section.set_elsewhere` has in its place."""
    kind, _, reason = instead.partition(": ")
    if kind == "nothing":
        return Problem(key, f"is not taken: {reason}", "leave it out")
    return Problem(key, "is set elsewhere", f"use {instead}")


def options_with(group: str, name: str) -> list[str]:
    """Return the options of a group, as overrides, whose file has this key."""
    return [f"{group}={option}" for option, keys in option_keys(group).items() if name in keys]


def option_keys(group: str) -> dict[str, list[str]]:
    """Return the keys that each option of a group has in its file; nothing for what is no group."""
    files = sorted((CONF_DIR / group).glob("*.yaml")) if group else []
    return {file.stem: _keys_of(file) for file in files}


def _keys_of(file: Path) -> list[str]:
    loaded = OmegaConf.load(file)
    return [str(key) for key in loaded] if isinstance(loaded, DictConfig) else []


def section_of(group: str, values: Mapping[str, Any]) -> type[Section] | None:
    """Return the class of a group's keys, for `values` as `flatten` gives them; None for what is no group."""
    field = Config.model_fields.get(group)
    section: Any = field.annotation if field is not None else None
    if section is Any:
        section = _named_class(values.get(group), group, [])
    return section if isinstance(section, type) and issubclass(section, Section) else None
