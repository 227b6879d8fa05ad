"""A few short rows and a small model: for runs that are about something else than what is learned."""

from __future__ import annotations

import json
import random
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

Row = dict[str, str]

VALIDATION = 3
"""Rows at the end that are for evaluation."""

SMALL = [
    f"model.embedded.config.{key}"
    for key in ("hidden_size=32", "intermediate_size=48", "num_attention_heads=4", "num_key_value_heads=2")
]


SYSTEM = "you are a helpful assistant."


def pairs(number: int = 13) -> list[Row]:
    """Return preference rows of 1 to 40 tokens an answer; some answers start alike, up to the last token.

    Every third prompt starts with the same text.
    Between one row and the next lie up to a hundred tokens, so a padded batch is mostly padding.
    """
    draw = random.Random(0)

    def text(longest: int) -> str:
        return "".join(draw.choices(string.ascii_lowercase + " ", k=draw.randint(1, longest)))

    rows = []
    for index in range(number):
        prompt, chosen, rejected = text(60), text(40), text(40)
        if index % 3 == 0:
            prompt = f"{SYSTEM} {prompt}"
        if index % 4 == 1:
            rejected = chosen[:-1] + "!"
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def write_rows(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Write preference rows, and the same as rows to imitate; return the overrides that read either."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {
            "id": f"row-{index}",
            "schema_version": "1.0",
            "inputs": {"question": row["prompt"]},
            "outputs": {"answer": row["chosen"]},
            "meta": {"source": "tests", "timestamp": "2026-01-05T08:11:00Z", "tags": ["tests"]},
        }
        for index, row in enumerate(rows)
    ]
    for kind, lines in (("dpo.jsonl", rows), ("jsonl", records)):
        for split in ("train", "val"):
            part = lines[:-VALIDATION] if split == "train" else lines[-VALIDATION:]
            (folder / f"{split}.{kind}").write_text("".join(json.dumps(line) + "\n" for line in part))
    return [f"data.splits_dir={folder}"]


_folder = tempfile.TemporaryDirectory(prefix="lora_exp-rows-")
ROWS = ["data=splits", *write_rows(Path(_folder.name), pairs(27))]
"""24 rows to train on and 3 to evaluate on, which every process of the tests writes for itself."""
