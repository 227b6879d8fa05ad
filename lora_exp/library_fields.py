"""Names that library config classes take, read from their source: importing them would take seconds."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

SOURCES = {
    "transformers.TrainingArguments": ("transformers", "training_args.py", "TrainingArguments"),
    "transformers.BitsAndBytesConfig": ("transformers", "utils/quantization_config.py", "BitsAndBytesConfig"),
    "peft.LoraConfig": ("peft", "tuners/lora/config.py", "LoraConfig"),
    "trl.SFTConfig": ("trl", "trainer/sft_config.py", "SFTConfig"),
    "trl.DPOConfig": ("trl", "trainer/dpo_config.py", "DPOConfig"),
}
"""Public name to (package, file below it, class)."""

VALUES = {
    "transformers.OptimizerNames": ("transformers", "training_args.py", r"class OptimizerNames\b.*?(?=\nclass |\n@)"),
    "transformers.SchedulerType": (
        "transformers",
        "trainer_utils.py",
        r"class SchedulerType\b.*?(?=\nclass |\n@|\ndef )",
    ),
    "peft.LoraConfig.init_lora_weights": ("peft", "tuners/lora/config.py", r"init_lora_weights: \(.*?\) = field"),
}
"""A closed set of texts to (package, file below it, what surrounds its members)."""
MEMBER = re.compile(r'^\s*(?:\w+ = )?"([\w\[\] ]+)",?$', re.MULTILINE)


@functools.cache
def library_fields(public_name: str) -> frozenset[str]:
    """Return the names that a library config class takes: its annotated fields, or the arguments of `__init__`.

    Fields inherited from another file are not included.

    Raises:
        KeyError: If the class is not listed in `SOURCES`.
    """
    package, file, class_name = SOURCES[public_name]
    tree = ast.parse(_source(package, file))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    fields = {node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    init = next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)
    if init is not None:
        fields |= {argument.arg for argument in [*init.args.args, *init.args.kwonlyargs]} - {"self"}
    return frozenset(name for name in fields if not name.startswith("_"))


@functools.cache
def library_values(public_name: str) -> tuple[str, ...]:
    """Return the members of a closed set of texts.

    Raises:
        KeyError: If the set is not listed in `VALUES`.
    """
    package, file, place = VALUES[public_name]
    found = re.search(place, _source(package, file), re.DOTALL)
    return tuple(MEMBER.findall(found.group())) if found else ()


def _source(package: str, file: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is a requirement of this package"
    assert spec.origin is not None
    return (Path(spec.origin).parent / file).read_text(encoding="utf-8")


def one_of(options: Iterable[str], value: str) -> str:
    """Return a value that is among the options.

    Raises:
        ValueError: If it is not; the message names them, and the nearest.
    """
    names = list(options)
    if value in names:
        return value
    near = nearest(value, names)
    raise ValueError(f"one of {', '.join(names)}" + (f" (did you mean {near}?)" if near else ""))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like `name`, if any is close."""
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
