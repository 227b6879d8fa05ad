"""The kinds of row that recipes learn from, and the formats that each kind comes in. A recipe names its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_exp.data.conversations import (
    CompletionMessagesRow,
    ImplicitPreferenceRow,
    MessagesRow,
    PreferenceMessagesRow,
)
from lora_exp.data.formats import RowFormat
from lora_exp.data.records import DataRecord
from lora_exp.data.texts import CompletionRow, InstructionRow, PreferenceRow

IGNORED = -100
"""The label of a token that carries no loss (torch.nn.CrossEntropyLoss's ignore_index)."""


class OtherRecipeError(ValueError):
    """A row that another recipe learns from."""


@dataclass(frozen=True)
class RowKind:
    """One kind of row.

    Args:
        formats: The ways to write one. Each is known by its marks; of equally good ones the first is taken.
        train_file: The name of the training file in a `splits_dir`.
        val_file: The name of the validation file there.
        answers: The columns that are learned from; each is tokenised behind the same prompt.
        override: What on the command line learns from such rows.
    """

    formats: tuple[RowFormat, ...]
    train_file: str
    val_file: str
    answers: tuple[str, ...]
    override: str

    def recognise(self, row: Mapping[str, object]) -> RowFormat:
        """Return the format of the first row of a file or a data set. Whether the row is right is another question.

        Raises:
            OtherRecipeError: If it is a row that another recipe learns from, which the message names.
            ValueError: If it has no format; the message names what the row has, and the formats that there are.
        """
        best = max(self.formats, key=lambda each: each.likeness(row))
        is_one, _, present = best.likeness(row)
        other = None if is_one else _of_another_kind(row, self)
        if other is not None:
            kind, found = other
            raise OtherRecipeError(f"looks like {_a_row(found)}: {kind.override}")
        if not present:
            keys = f"has {', '.join(map(str, row))}" if row else "is an empty object"
            formats = "; ".join(f"{each.name} {each.keys}" for each in self.formats)
            raise ValueError(f"{keys}, which is no row of these formats: {formats}")
        return best

    def stranger(self, row: Mapping[str, object], began: RowFormat) -> str | None:
        """Say that a row, one that its file's format refuses, is of another format; None where it is of none.

        Args:
            row: The row.
            began: The format of the file's first row.
        """
        best = max(self.formats, key=lambda each: each.likeness(row))
        if not best.likeness(row)[0]:
            other = _of_another_kind(row, self)
            return None if other is None else _mixed(other[1], began)
        return None if best is began else _mixed(best, began)


def _mixed(found: RowFormat, began: RowFormat) -> str:
    return f"is {_a_row(found)}, the file began with {began.name} rows"


def _a_row(row_format: RowFormat) -> str:
    article = "an" if row_format.name[0] in "aeiou" else "a"
    return f"{article} {row_format.name} row"


COMPLETION = RowKind(
    (
        RowFormat("DataRecord", DataRecord),
        RowFormat("prompt-completion", CompletionRow),
        RowFormat("prompt-completion messages", CompletionMessagesRow),
        RowFormat("messages", MessagesRow),
        RowFormat("instruction", InstructionRow),
    ),
    "train.jsonl",
    "val.jsonl",
    ("completion",),
    "recipe=sft",
)
PREFERENCE = RowKind(
    (
        RowFormat("preference", PreferenceRow),
        RowFormat("preference messages", PreferenceMessagesRow),
        RowFormat("implicit-prompt preference messages", ImplicitPreferenceRow),
    ),
    "train.dpo.jsonl",
    "val.dpo.jsonl",
    ("chosen", "rejected"),
    "recipe=dpo",
)
KINDS = (COMPLETION, PREFERENCE)


def _of_another_kind(row: Mapping[str, object], kind: RowKind) -> tuple[RowKind, RowFormat] | None:
    found = [(each.likeness(row), other, each) for other in KINDS if other is not kind for each in other.formats]
    best, other, row_format = max(found, key=lambda item: item[0])
    return (other, row_format) if best[0] else None
