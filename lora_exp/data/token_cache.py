"""Token ids kept between runs, by the rows, the tokenizer, the limits and the template that they were made with."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import date
from typing import TYPE_CHECKING, Any

from lora_exp.data.cache import Cache, Entry, key_of
from lora_exp.data.lengths import RowLengths
from lora_exp.data.rows import digest_of

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_exp.data.split import Split
    from lora_exp.data.tokenize import Limits, SplitReport

Tokens = tuple["Dataset", "SplitReport"]


def token_key(split: Split, how: Mapping[str, Any], limits: Limits, tokenizer: Any) -> str | None:
    """Return the name under which a split's token ids are kept; None where they are not a matter of these alone.

    Args:
        split: The rows.
        how: What else decides how a row becomes ids.
        limits: How long it may be.
        tokenizer: The tokenizer, which must be able to say how it works.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    template = str(tokenizer.chat_template)
    return key_of(
        "tokens",
        rows=digest_of(split.rows),
        how=how,
        limits=dataclasses.asdict(limits),
        backend=backend.to_str(),
        template=template,
        special=[tokenizer.special_tokens_map, tokenizer.all_special_tokens],
        # A template may write the day into every prompt.
        day=str(date.today()) if "strftime_now" in template else None,
    )


def kept_tokens(cache: Cache, key: str | None, make: Callable[[], Tokens], split: Split) -> tuple[Tokens, bool]:
    """Return a split's token ids, and whether they were kept; otherwise they are made and kept for the next run.

    Args:
        cache: Where they are kept.
        key: Their name there; None keeps nothing.
        make: Makes them.
        split: The rows; the report calls them by its names, wherever they were when it was written.
    """
    entry = cache.find(key) if key else None
    if key and entry:
        return _read(entry, key, split), True
    made = make()
    if key and cache.max_size:
        _write(cache, key, *made)
    return made, False


def _read(entry: Entry, key: str, split: Split) -> Tokens:
    import datasets
    import pyarrow

    from lora_exp.data.tokenize import SplitReport

    with pyarrow.memory_map(str(entry.folder / "tokens.arrow")) as file:
        table = pyarrow.ipc.open_file(file).read_all()
    facts = entry.facts["report"]
    names = {"source": split.source, "format": split.format}
    counted = {"dropped": Counter(facts["dropped"]), "lengths": RowLengths(**facts["lengths"])}
    report = SplitReport(**{**facts, **names, **counted})
    # Its own fingerprint would be a digest of all ids.
    return datasets.Dataset(table, fingerprint=key.rpartition("-")[2]), report


def _write(cache: Cache, key: str, dataset: Dataset, report: SplitReport) -> None:
    import pyarrow

    with cache.draft() as folder:
        table = dataset.data.table
        with (
            pyarrow.OSFile(str(folder / "tokens.arrow"), "wb") as file,
            pyarrow.ipc.new_file(file, table.schema) as stream,
        ):
            stream.write_table(table)
        cache.keep(folder, key, {"report": {**vars(report), "lengths": report.lengths.as_dict()}})
