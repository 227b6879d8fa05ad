"""Reference log-probabilities of a data set: read from the store, or computed packed and stored.

A value is one answer's log-probabilities by token, float32, so that what a loss makes of them (their sum, or LD-DPO's
weighting of tokens beyond the shorter answer) is not frozen into the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from trl.trainer.utils import FusedCausalLMOutput, use_adapter

from lora_exp.data.kinds import IGNORED
from lora_exp.engine.packing import Family, Row, microbatches, pack
from lora_exp.engine.store import ReferenceStore, row_key
from lora_exp.reports.console import Steps

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_exp.engine.identity import Identity

ANSWERS = ("chosen_ids", "rejected_ids")
"""Columns of a tokenised preference row, in the order in which TRL's collator stacks them."""

ROWS_AT_ONCE = 256
"""Rows summed in one padded batch."""

KEPT_AT_ONCE = 64
"""Micro-batches between two writes, or a few more: what a kill can cost."""


def add_reference(trainer: Any, store: ReferenceStore, identity: Identity) -> dict[str, int]:
    """Give the rows of a packed DPO trainer their reference log-probabilities.

    Returns:
        How many rows were `computed` and how many `reused`; a row of which one answer was missing is computed.
    """
    datasets = [each for each in (trainer.train_dataset, trainer.eval_dataset) if each is not None]
    pairs = [(row["prompt_ids"], *(row[name] for name in ANSWERS)) for dataset in datasets for row in dataset]
    keys = [tuple(row_key(prompt, answer) for answer in answers) for prompt, *answers in pairs]
    wanted = sorted({key for both in keys for key in both})
    values = store.get(identity.digest, wanted)
    missing = [number for number, both in enumerate(keys) if any(key not in values for key in both)]
    for part in _compute(trainer, [_family(*pairs[number]) for number in missing], [keys[n] for n in missing]):
        # Of a pair one answer may have been there; computed again beside other rows it is rounded otherwise.
        part = {key: value for key, value in part.items() if key not in values}
        store.put(identity.digest, identity.description, part)
        values |= part
    if missing:
        # What another process computed meanwhile was rounded beside other rows; every run uses what is stored.
        values |= store.get(identity.digest, wanted)
    trainer.train_dataset = _with_columns(trainer, trainer.train_dataset, values)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = _with_columns(trainer, trainer.eval_dataset, values)
    trainer.precompute_ref_logps = True
    return {"computed": len(missing), "reused": len(pairs) - len(missing)}


def _family(prompt: list[int], *answers: list[int]) -> Family:
    """Return a pair as rows 0 and 1, each with its answer scored."""
    rows = []
    for index, answer in enumerate(answers):
        ids = np.array(prompt + answer, dtype=np.int64)
        labels = np.array([IGNORED] * len(prompt) + answer, dtype=np.int64)
        rows.append(Row(index, ids, labels))
    return Family(tuple(rows))


def _compute(trainer: Any, missing: list[Family], keys: list[tuple[bytes, ...]]) -> Iterable[dict[bytes, bytes]]:
    """Yield the values of what is missing, a stretch of rows at a time."""
    if not missing:
        return
    budget = trainer.tokens_per_microbatch
    stretches = [
        [[stretch[place] for place in members] for members in microbatches([[missing[n]] for n in stretch], budget)]
        for stretch in _stretches([len(family) for family in missing], KEPT_AT_ONCE * budget)
    ]
    adapter = "ref" if "ref" in trainer.model.peft_config else None
    training = trainer.model.training
    trainer.model.eval()
    with use_adapter(trainer.model, adapter), torch.no_grad(), Steps("reference", sum(map(len, stretches))) as steps:
        for bins in stretches:
            done: dict[bytes, bytes] = {}
            for members in bins:
                done |= _score(trainer, [missing[index] for index in members], [keys[index] for index in members])
                steps.advance()
            yield done
    trainer.model.train(training)


def _stretches(sizes: list[int], budget: int) -> list[list[int]]:
    """Cut things, in their order, into stretches of at least `budget`.

    What is left after a kill begins with a stretch, so that it is packed as it would have been: how a row is rounded
    depends on the rows beside it.
    """
    stretches: list[list[int]] = [[]]
    load = 0
    for index, size in enumerate(sizes):
        if load >= budget:
            stretches.append([])
            load = 0
        stretches[-1].append(index)
        load += size
    return stretches


def _score(trainer: Any, members: list[Family], keys: list[tuple[bytes, ...]]) -> dict[bytes, bytes]:
    renumbered = [
        Family(tuple(Row(len(family.rows) * place + row.index, row.ids, row.labels) for row in family.rows))
        for place, family in enumerate(members)
    ]
    row = pack(renumbered)
    with trainer.accelerator.autocast():
        log_probs = trainer.packed_forward.scores(row).log_probs.cpu()
    values = log_probs.numpy()[row.sources]
    flat = [key for both in keys for key in both]
    return {key: values[row.rows == number].tobytes() for number, key in enumerate(flat)}


def _with_columns(trainer: Any, dataset: Dataset, values: Mapping[bytes, bytes]) -> Dataset:
    """Add TRL's columns of reference sums, which TRL itself takes from the log-probabilities by token."""
    sums: tuple[list[float], list[float]] = ([], [])
    for first in range(0, len(dataset), ROWS_AT_ONCE):
        rows = [dataset[index] for index in range(first, min(first + ROWS_AT_ONCE, len(dataset)))]
        inputs = trainer.data_collator(rows)
        output = FusedCausalLMOutput(log_probs=_padded(rows, values, inputs["input_ids"].shape[1] - 1))
        for total, part in zip(sums, trainer.compute_ref_log_probs(_Answers(output), inputs), strict=True):
            total.extend(part.tolist())
    return dataset.add_column("ref_chosen_logps", sums[0]).add_column("ref_rejected_logps", sums[1])


@dataclass(frozen=True)
class _Answers:
    """A model whose answer is known."""

    output: FusedCausalLMOutput

    def __call__(self, **_: Any) -> FusedCausalLMOutput:
        return self.output


def _padded(rows: list[dict[str, Any]], values: Mapping[bytes, bytes], width: int) -> torch.Tensor:
    """Return the stored log-probabilities as TRL's batch has them [2 rows, width]: all chosen, then all rejected."""
    log_probs = torch.zeros(len(ANSWERS) * len(rows), width)
    answers = [(row["prompt_ids"], row[name]) for name in ANSWERS for row in rows]
    for number, (prompt, answer) in enumerate(answers):
        stored = np.frombuffer(values[row_key(prompt, answer)], dtype=np.float32)
        last = len(prompt) + len(answer) - 1
        log_probs[number, last - len(stored) : last] = torch.from_numpy(stored.copy())
    return log_probs
