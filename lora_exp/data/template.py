"""The chat template that rows go through: the tokenizer's own or the config's, and what mends one that does not fit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_exp.data.chat import RefusedError
from lora_exp.errors import Problem, UserError, count

KEY = "data.chat_template_path"
TRL = "pkg://trl.chat_templates"
"""TRL's templates: `<model>.jinja` as the model has it, and for some `<model>_training.jinja` (trl 1.16)."""

OWN = f"{KEY}=my.jinja"
ROW_BY_ROW = "give each answer a row of its own, with what came before it as its prompt"
MENDS = {
    "refused": f"mend these rows, or train with another template: {OWN}",
    "left out": f"take it out of the rows, or train with a template that shows it: {OWN}",
    "rewritten": f"{ROW_BY_ROW}; or train with a template that keeps earlier messages as they are: {OWN}",
    "marks": "put {% generation %} and {% endgeneration %} around all that the assistant says",
    "token": f"{ROW_BY_ROW}; or train with a template that ends a message with a special token: {OWN}",
}
"""What helps against what a template does to a row, by `RefusedError.mend`."""


def use_template(tokenizer: Any, path: str | None) -> None:
    """Give a tokenizer the chat template in a file; it is saved with the adapter. None: leave the tokenizer's own.

    Args:
        tokenizer: The model's.
        path: A Jinja file, or `pkg://package.folder/file.jinja`.

    Raises:
        UserError: If there is no such file, or it is no template.
    """
    if path is None:
        return
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokenizer.chat_template = _resolve(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError("the chat template cannot be read", [Problem(KEY, f"{path}: {why}", OWN)]) from error
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except TemplateSyntaxError as error:
        where = Problem(f"{path}:{error.lineno}", error.message or "is no Jinja template")
        raise UserError("the chat template cannot be used", [where]) from error
    except TemplateError:
        return  # it asks for more than a greeting


def _resolve(path: str) -> Path:
    if not path.startswith("pkg://"):
        return Path(path)
    package, _, file = path.removeprefix("pkg://").partition("/")
    top, *folders = package.split(".")
    spec = find_spec(top)  # imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the chat template cannot be read", [Problem(KEY, f"there is no package {top}", OWN)])
    return Path(spec.submodule_search_locations[0]).joinpath(*folders, file)


class Refusals:
    """Rows that the template cannot take, by reason.

    Args:
        source: Where the rows come from.
        tokenizer: Its template is looked up among TRL's.
    """

    def __init__(self, source: str, tokenizer: Any) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.first: dict[str, tuple[int, RefusedError]] = {}
        self.numbers: dict[str, int] = {}

    def add(self, row: int, error: RefusedError) -> None:
        """Note a row by its index."""
        self.first.setdefault(error.what, (row, error))
        self.numbers[error.what] = self.numbers.get(error.what, 0) + 1

    def problems(self) -> list[Problem]:
        """Return one problem for each reason, with the first row that has it."""
        return [
            Problem(self.source, f"row {row + 1}{self._others(what)}: {error}", self._mend(error.mend))
            for what, (row, error) in self.first.items()
        ]

    def _others(self, what: str) -> str:
        others = self.numbers[what] - 1
        return f" and {count(others, 'other')}" if others else ""

    def _mend(self, kind: str) -> str:
        better = trl_version(self.tokenizer.chat_template) if kind == "rewritten" else None
        return MENDS[kind] if better is None else f"{KEY}={better}, TRL's version of it; or {ROW_BY_ROW}"


def trl_version(template: str) -> str | None:
    """Return, as a value for `data.chat_template_path`, TRL's version of a template that keeps earlier messages."""
    for file in sorted(_resolve(f"{TRL}/").glob("*_training.jinja")):
        original = file.with_name(file.name.replace("_training", ""))
        if original.is_file() and original.read_text(encoding="utf-8") == template:
            return f"{TRL}/{file.name}"
    return None
