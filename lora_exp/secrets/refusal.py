"""Secrets in a config: refused before anything is written, as Hydra and the run keep the config in the run folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydra.core.override_parser.types import Override

from lora_exp.errors import Problem
from lora_exp.secrets.masking import FROM_ENVIRONMENT, SHAPES, environment_secrets, is_secret_name

KEPT = "and the config is kept in the run folder"
MEND = "put it into a variable whose name ends in _PASSWORD, _TOKEN or _KEY; write ${{oc.env:{}}}, in single quotes"


def secret_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each key that holds a secret.

    Args:
        config: As composed; interpolations not resolved.
    """
    known = environment_secrets()
    return [problem for key, value in _strings(config) if (problem := _problem(key, value, known))]


def hydra_problems(overrides: Iterable[Override]) -> list[Problem]:
    """Return the overrides of Hydra's own keys that would have it write a secret into `.hydra/hydra.yaml`."""
    own = [each for each in overrides if each.is_hydra_override() and not each.is_sweep_override()]
    problems = [problem for each in own for problem in secret_problems({each.key_or_group: each.value()})]
    for each in own:
        copied = [name for _, name in _strings(each.value()) if is_secret_name(name)]
        if each.key_or_group == "hydra.job.env_copy" and copied:
            what = f"would copy the value of ${', $'.join(copied)} into the run folder"
            problems.append(Problem(each.key_or_group, what, "leave it out: a job has the environment of its command"))
    return problems


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string of a config with its dotted key."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, str) and value:
        yield key, value


def _problem(key: str, value: str, known: Mapping[str, str]) -> Problem | None:
    name = key.rpartition(".")[2]
    if is_secret_name(name):
        variable = "HF_TOKEN" if "hub" in name.lower() else name.upper()
        return Problem(key, f"is a secret by its name, {KEPT}", f"give it by the environment: {variable}=...")
    for secret, written in known.items():
        if secret in value:
            variable = FROM_ENVIRONMENT.sub(r"\1", written)
            return Problem(
                key, f"holds the value of ${variable}, {KEPT}", f"write {written} in its place, in single quotes"
            )
    if SHAPES.search(FROM_ENVIRONMENT.sub("", value)):
        return Problem(key, f"holds a password or a token, {KEPT}", MEND.format("DATA_PASSWORD"))
    found = SHAPES.search(value)
    for variable in FROM_ENVIRONMENT.findall(found[0]) if found else []:
        if not is_secret_name(variable):
            what = f"takes a password from ${variable}, which is no secret by its name and would not be masked"
            return Problem(key, what, MEND.format(f"{variable}_PASSWORD"))
    return None
