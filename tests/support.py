"""What is trained where: the table that `tests/smoke/test_support_table.py` runs and docs/SUPPORT.md shows.

`python -m tests.support` prints the document, `python -m tests.support --write` writes it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "SUPPORT.md"

RECIPES = ("sft", "dpo")
QUANTS = ("none", "8bit", "4bit")
ENGINES = ("packed", "padded")
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "mps", "xpu")
LORAS = ("lora", "rslora", "dora", "pissa")

EXPECTED_ON = ("cpu", "cuda")
"""Devices of which the table says what a run should do. The test runs them where they are there."""

RAN_ON = ("cpu",)
"""Devices on which every case of the table passed. Add one only after `pytest tests/smoke/test_support_table.py` has
passed on it without a skip; until then the document says `not run`."""

TRAINED = "trained"
NOT_RUN = "not run"

SELECTED = {
    "float32": ("trainer.bf16=false",),
    "bfloat16": ("trainer.bf16=true",),
    "float16": ("trainer.fp16=true",),
    "cpu": ("trainer=cpu",),
    "cuda": ("device=cuda",),
}
"""The overrides that select a dtype and a device."""


@dataclass(frozen=True)
class Case:
    """A combination of choices."""

    recipe: str
    quant: str
    engine: str
    dtype: str
    device: str
    lora: str = "lora"

    @property
    def overrides(self) -> tuple[str, ...]:
        """The config's overrides that select it."""
        groups = (f"{group}={getattr(self, group)}" for group in ("recipe", "quant", "engine", "lora"))
        return (*groups, *SELECTED[self.device], *SELECTED[self.dtype])

    @property
    def declined(self) -> str | None:
        """What the message says with which a run stops; None where it trains."""
        return next((each.reason for each in DECLINED if each.covers(self)), None)

    def __str__(self) -> str:
        return "-".join((self.device, self.recipe, self.quant, self.engine, self.dtype, self.lora))


@dataclass(frozen=True)
class Declined:
    """Cases that a run refuses before it loads weights, and the message."""

    covers: Callable[[Case], bool]
    reason: str


DECLINED = (
    Declined(lambda case: case.device == "cpu" and case.dtype == "float16", "fp16 training needs a GPU"),
    Declined(
        lambda case: case.lora == "pissa" and case.quant != "none",
        "PiSSA writes into the base weights, which cannot be done once they are quantised",
    ),
)

CASES = tuple(
    Case(recipe, quant, engine, dtype, device)
    for device, quant, dtype, engine, recipe in itertools.product(EXPECTED_ON, QUANTS, DTYPES, ENGINES, RECIPES)
)
VARIANTS = tuple(
    Case("dpo", quant, engine, dtype, "cpu", lora)
    for quant, dtype, lora, engine in itertools.product(QUANTS, DTYPES[:2], LORAS[1:], ENGINES)
)
"""Other kinds of adapters; with `lora=lora` the same are among `CASES`."""

HEAD = """\
# What trains where

`make support` writes this page from the table that the tests run (`tests/support.py`).

- **trained**: the tests train it for two steps, on a small random Llama. They check that the adapter changes, and that
  `run.json` names this engine, dtype and device: no other takes its place. They do not check speed or quality here.
- **declined**: the run stops before it loads the weights. The number leads to the message, below the table.
- **not run**: nobody has run the tests on such a device. What happens there is not known.

"""


def outcome(case: Case) -> str:
    """Return `trained`, the message of the refusal, or `not run`."""
    return NOT_RUN if case.device not in RAN_ON else case.declined or TRAINED


def document() -> str:
    """Return the text of docs/SUPPORT.md."""
    devices = [["device", "tests"], *([_shown(device), _tests_on(device)] for device in DEVICES)]
    parts = [HEAD + _table(devices)]
    for device in RAN_ON:
        cases = [case for case in CASES if case.device == device]
        parts.append(f"## {_shown(device)}\n\nWith `lora=lora`.\n\n" + _by_dtype(cases, ("quant", "recipe", "engine")))
    text = "## Other kinds of adapters\n\nWith `recipe=dpo`, on the CPU.\n\n"
    parts.append(text + _by_dtype(VARIANTS, ("lora", "quant", "engine")))
    return "\n".join(parts)


def _tests_on(device: str) -> str:
    if device not in RAN_ON:
        return NOT_RUN
    cases = [case for case in CASES if case.device == device]
    trained = sum(case.declined is None for case in cases)
    return f"{trained} combinations trained, {len(cases) - trained} declined"


def _shown(device: str) -> str:
    return device.upper()


def _by_dtype(cases: Sequence[Case], names: tuple[str, ...]) -> str:
    """Return a table of cases, a row for each combination of `names`, a column for each dtype; then the messages."""
    dtypes = [dtype for dtype in DTYPES if any(case.dtype == dtype for case in cases)]
    outcomes = {(*(getattr(case, name) for name in names), case.dtype): outcome(case) for case in cases}
    messages = list(dict.fromkeys(each for each in outcomes.values() if each not in (TRAINED, NOT_RUN)))

    def cell(found: str) -> str:
        return f"declined ({messages.index(found) + 1})" if found in messages else found

    rows = sorted({row[:-1] for row in outcomes}, key=lambda row: [_ORDER.index(value) for value in row])
    table = [[*names, *dtypes], *([*row, *(cell(outcomes[(*row, dtype)]) for dtype in dtypes)] for row in rows)]
    listed = "".join(f"{number}. {message}\n" for number, message in enumerate(messages, 1))
    return _table(table) + (f"\n{listed}" if listed else "")


_ORDER = (*LORAS, *QUANTS, *RECIPES, *ENGINES)


def _table(rows: Iterable[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |\n" for row in rows)
    return head + "|" + "---|" * (head.count("|") - 1) + "\n" + "".join(body)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support", description="Make docs/SUPPORT.md.")
    parser.add_argument("--write", action="store_true", help="write the file instead of printing it")
    if parser.parse_args().write:
        DOCUMENT.write_text(document(), encoding="utf-8")
    else:
        print(document(), end="")  # noqa: T201


if __name__ == "__main__":
    main()
