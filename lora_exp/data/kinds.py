"""The kinds of row that recipes learn from. A recipe names its kind; the data room needs to know no recipe."""

from __future__ import annotations

from dataclasses import dataclass

from lora_exp.data.preference import CompletionRow, PreferenceRow
from lora_exp.data.records import DataRecord

IGNORED = -100
"""The label of a token that carries no loss (torch.nn.CrossEntropyLoss's ignore_index)."""


@dataclass(frozen=True)
class RowKind:
    """One kind of row.

    Args:
        file_row: The pydantic model that checks a line of our own files.
        column_row: The one that checks a row of a `load_dataset` source, once its columns are mapped.
        train_file: The name of the training file in a `splits_dir`.
        val_file: The name of the validation file there.
        answers: The columns that are learned from; each is tokenised behind the same prompt.
    """

    file_row: type[DataRecord] | type[PreferenceRow]
    column_row: type[CompletionRow] | type[PreferenceRow]
    train_file: str
    val_file: str
    answers: tuple[str, ...]


COMPLETION = RowKind(DataRecord, CompletionRow, "train.jsonl", "val.jsonl", ("completion",))
PREFERENCE = RowKind(PreferenceRow, PreferenceRow, "train.dpo.jsonl", "val.dpo.jsonl", ("chosen", "rejected"))
