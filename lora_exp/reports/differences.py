"""Two runs of one config: what differs in what they were made of, and in what came out of them, time left aside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lora_exp.provenance import sha256
from lora_exp.reports.console import console, say

DIGITS = 12
"""Of a digest, as it is shown."""

NONE = "-"
MEASURED = ("runtime", "per_second")
"""How the names of metrics end that are no results: the clock's."""

ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Difference:
    """One value of two runs; `by` is how far they lie apart, where both are numbers."""

    name: str
    then: str
    now: str
    by: str = ""


# Inputs ----------------------------------------------------------------------------------------------


def inputs_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run was made of, as far as its `run.json` tells: a name and a value each."""
    return {
        name: NONE if value is None else str(value)
        for part in (_versions, _git, _device, _data, _base)
        for name, value in part(facts)
    }


def _versions(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return (facts.get("versions") or {}).items()


def _git(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    if "git" in facts:
        git = facts["git"] or {}
        yield "git commit", git.get("commit")
        other = "untracked files" if git.get("dirty") else "none"
        yield "changes since", _digest(git["changes"]) if git.get("changes") else other


def _device(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return ((f"device {name}" if name != "threads" else name, each) for name, each in facts.get("device", {}).items())


def _data(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for split, of_split in (facts.get("data") or {}).items():
        yield from ((f"data {split}: {file}", _digest(digest)) for file, digest in of_split["sha256"].items())
        if of_split["revision"] is not None:
            yield f"data {split}: {of_split['source']}", of_split["revision"]


def _base(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    base, start = facts.get("base") or {}, facts.get("start_adapter") or {}
    yield from ((f"base {name}", _digest(value) if name == "xxh3" else value) for name, value in base.items())
    yield from ((f"start adapter {name}", _digest(digest)) for name, digest in start.get("sha256", {}).items())


def _digest(value: Any) -> str:
    return "gone" if value is None else str(value)[:DIGITS]


def input_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Return what is another value in the parts of `run.json` that both have.

    Args:
        then: The facts of the first run.
        now: Those of the second; parts that it does not know yet are left out.
    """
    before, after = inputs_of({part: then[part] for part in now if part in then}), inputs_of(now)
    names = list(dict.fromkeys([*before, *after]))
    both = [(name, before.get(name, NONE), after.get(name, NONE)) for name in names]
    return [Difference(name, old, new) for name, old, new in both if old != new]


# Numbers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came out of two runs.

    Args:
        numbers: The final metrics that differ.
        compared: How many were compared.
        adapter: How the adapters differ, as a sentence; empty where they are bitwise equal.
    """

    numbers: list[Difference]
    compared: int
    adapter: str

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.numbers and not self.adapter


def outcome(then: Path, now: Path) -> Outcome:
    """Compare the results of two run folders."""
    before, after = (_results(folder) for folder in (then, now))
    names = list(dict.fromkeys([*before, *after]))
    differing = [name for name in names if before.get(name) != after.get(name)]
    numbers = [_difference(name, before.get(name), after.get(name)) for name in differing]
    return Outcome(numbers, len(names), adapter_difference(then / "adapter" / ADAPTER, now / "adapter" / ADAPTER))


def _results(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {name: value for name, value in metrics.items() if not name.endswith(MEASURED)}


def _difference(name: str, then: Any, now: Any) -> Difference:
    both = all(isinstance(value, int | float) for value in (then, now))
    return Difference(name, _text(then), _text(now), f"{now - then:+.3g}" if both else "")


def _text(value: Any) -> str:
    return NONE if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)


def adapter_difference(then: Path, now: Path) -> str:
    """Say how two adapter files differ; empty where they are the same bytes."""
    if sha256(then) == sha256(now):
        return ""
    from safetensors.torch import load_file

    before, after = load_file(then), load_file(now)
    if {name: each.shape for name, each in before.items()} != {name: each.shape for name, each in after.items()}:
        return f"of other shapes: {len(before):,} tensors then, {len(after):,} now"
    apart = {name: float((before[name].double() - after[name].double()).abs().max()) for name in before}
    differing = sum(each != 0 for each in apart.values())
    if not differing:
        return "of the same numbers in other bytes: another number format or other metadata"
    return f"differs in {differing:,} of {len(apart):,} tensors, by up to {max(apart.values()):.3g}"


# Words -----------------------------------------------------------------------------------------------


def tell_inputs(differences: list[Difference], known: str) -> None:
    """Print the inputs that changed, or that none did.

    Args:
        differences: Them.
        known: What was compared, in a word or two.
    """
    say("inputs", f"{known}: {'these changed' if differences else 'as they were'}")
    if differences:
        _table(differences, "input", numbers=False)


def tell_outcome(found: Outcome) -> None:
    """Print the numbers that differ, and whether the adapters are the same."""
    if found.numbers:
        _table(found.numbers, "number", numbers=True)
    same = found.compared - len(found.numbers)
    say("numbers", f"{same:,} of {found.compared:,} the same")
    say("adapter", found.adapter or "bitwise equal")


def _table(differences: list[Difference], name: str, numbers: bool) -> None:
    table = Table(box=SIMPLE_HEAD)
    justify: Any = "right" if numbers else "left"
    table.add_column(name, overflow="fold")
    table.add_column("then", justify=justify, overflow="fold")
    table.add_column("now", justify=justify, overflow="fold")
    if numbers:
        table.add_column("difference", justify="right")
    for each in differences:
        table.add_row(each.name, each.then, each.now, *([each.by] if numbers else []))
    console.print(table)
