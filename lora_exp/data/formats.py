"""What a row format is: a name to say out loud, a model that checks a row, and the marks by which it is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, Field


def whole_characters(value: str) -> str:
    """Refuse half a surrogate pair, which JSON can spell and no tokenizer can read."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half a surrogate pair, which is no character") from error
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    return whole_characters(value)


VerbatimText = Annotated[str, AfterValidator(_not_blank), Field(json_schema_extra={"pattern": r"\S"})]
"""A string that is not blank, kept as it is: without a chat template, prompt and answer are joined verbatim."""


class Row(BaseModel, ABC):
    """A row as it stands in a file. Keys that are not fields are left out."""

    marks: ClassVar[Mapping[str, type]]
    """The keys by which the format is known, each with the Python type of its value."""

    @abstractmethod
    def columns(self) -> dict[str, Any]:
        """Return what is learned from.

        Returns:
            `prompt` and one entry for each answer of the row kind, all strings or all lists of messages; or
            `messages`, a whole conversation. Where the row has them, also `tools`: a list of JSON schemas.
        """


@dataclass(frozen=True)
class RowFormat:
    """One way to write a row.

    Args:
        name: What it is called: "900 rows of messages".
        row: Checks a row.
    """

    name: str
    row: type[Row]

    @property
    def keys(self) -> str:
        """Return its keys for messages to the user, `{prompt, completion}`; a list shows as `messages: [...]`."""
        keys = (f"{key}: [...]" if kind is list else key for key, kind in self.row.marks.items())
        return f"{{{', '.join(keys)}}}"

    def likeness(self, row: Mapping[str, object]) -> tuple[bool, int, int]:
        """Return how much a row looks like this format: more is more. The first part says whether it is one."""
        present = [key for key in self.row.marks if key in row]
        fitting = sum(isinstance(row[key], self.row.marks[key]) for key in present)
        return fitting == len(self.row.marks), fitting, len(present)
