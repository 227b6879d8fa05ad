"""Preference rows: a prompt, the answer that was preferred, and the one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, Field

from lora_exp.data.jsonl import JsonlFile, read_all
from lora_exp.data.records import whole_characters

if TYPE_CHECKING:
    from datasets import Dataset


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    return whole_characters(value)


VerbatimText = Annotated[str, AfterValidator(_not_blank), Field(json_schema_extra={"pattern": r"\S"})]
"""A string that is not blank, kept as it is: without a chat template, prompt and answer are joined verbatim."""


class PreferenceRow(BaseModel):
    """One DPO row."""

    prompt: VerbatimText = Field(description="What was asked.")
    chosen: VerbatimText = Field(description="The answer that was preferred.")
    rejected: VerbatimText = Field(description="The answer that was not.")

    def columns(self) -> dict[str, str]:
        """Return `prompt`, `chosen` and `rejected`."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


class CompletionRow(BaseModel):
    """One SFT row as the hub's data sets have it: TRL's prompt-completion format."""

    prompt: VerbatimText
    completion: VerbatimText

    def columns(self) -> dict[str, str]:
        """Return `prompt` and `completion`."""
        return {"prompt": self.prompt, "completion": self.completion}


def load_preference_jsonl(path: str | Path) -> Dataset:
    """Read a JSON Lines file of preference rows into a dataset with the columns prompt, chosen, rejected.

    Keys beyond these three are left out; the strings are kept as they are.

    Raises:
        lora_exp.errors.UserError: Every line that is not an object of three non-empty strings, as
            `file:line: reason`, or a file that is missing or has no rows.
    """
    (rows,) = read_all([JsonlFile(Path(path), PreferenceRow)])
    from datasets import Dataset

    return Dataset.from_list([row.columns() for row in rows])
