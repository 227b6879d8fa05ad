"""A file of preference rows as a dataset, for Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.data.cache import NO_CACHE
from lora_exp.data.kinds import PREFERENCE
from lora_exp.data.read import read_files

if TYPE_CHECKING:
    from datasets import Dataset


def load_preference_jsonl(path: str | Path) -> Dataset:
    """Read a JSON Lines file of preference rows into a dataset with the columns prompt, chosen, rejected.

    Keys beyond these three are left out; strings are kept as they are, and so are the messages of rows that are made
    of messages. A prompt that is implicit in its answers is taken out of them.

    Raises:
        lora_exp.errors.UserError: Every line that is no preference row, as `file:line: reason`, or a file that is
            missing or has no rows.
    """
    (file,) = read_files([Path(path)], PREFERENCE, NO_CACHE)
    from datasets import Dataset

    # Messages are kept as they are: Arrow alone would give every message the keys of all others.
    return Dataset.from_list(list(file.rows), on_mixed_types="use_json")
