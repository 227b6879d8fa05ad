"""What a dry run prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.bar import Bar as RichBar
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lora_exp.data.lengths import RowLengths
from lora_exp.data.tokenize import Limits
from lora_exp.engine.settings import size_text
from lora_exp.errors import count
from lora_exp.preflight.duration import Duration
from lora_exp.preflight.estimate import Estimate
from lora_exp.preflight.lengths import Effect, effect, histogram, other_limits, other_prompt_limits
from lora_exp.preflight.memory import Place
from lora_exp.preflight.schedule import Schedule
from lora_exp.reports.console import console, say
from lora_exp.reports.figures.base import short_names
from lora_exp.reports.page import duration as time_text

BAR = 40
"""Characters of the longest bar."""


@dataclass(frozen=True)
class Line:
    """One trial of a sweep in the table of a dry run.

    Args:
        axes: The value of each key that varies.
        cells: What is said of it, in the order of `COLUMNS`; nothing where it cannot be told.
        fits: Whether it can run as it is.
        trouble: Why it cannot, or why nothing can be told.
    """

    axes: Mapping[str, str]
    cells: tuple[str, ...]
    fits: bool
    trouble: str = ""


def show_lengths(split: str, lengths: RowLengths, limits: Limits) -> None:
    """Print how long the rows of a split are, and what limits do to them."""
    bars = histogram(lengths.longest)
    most = max(bar.rows for bar in bars)
    table = _table(f"{split}: tokens of a row before anything is cut")
    table.add_column("tokens", justify="right")
    table.add_column("rows", justify="right")
    table.add_column("")
    for bar in bars:
        tokens = f"{bar.low:,} to {bar.high:,}" if bar.high > bar.low else f"{bar.low:,}"
        table.add_row(tokens, f"{bar.rows:,}", RichBar(most, 0, bar.rows, width=BAR, color="cyan"))
    console.print(table)
    _show_effects(split, lengths, limits)


def _show_effects(split: str, lengths: RowLengths, limits: Limits) -> None:
    table = _table(f"{split}: what other limits would do")
    for name in ("max_length", "max_prompt_length", "rows cut", "tokens cut", "rows dropped"):
        table.add_column(name, justify="right")
    for number, tried in enumerate((other_limits(lengths, limits), other_prompt_limits(lengths, limits))):
        if number:
            table.add_section()
        for each in tried:
            table.add_row(*_effect_cells(effect(lengths, each)), style="bold" if each == limits else "")
    console.print(table)


def _effect_cells(found: Effect) -> tuple[str, ...]:
    prompt = found.limits.max_prompt_length
    return (
        f"{found.limits.max_length:,}",
        "null" if prompt is None else f"{prompt:,}",
        _share(found.cut, found.rows),
        f"{found.cut_tokens:,}",
        _share(found.dropped, found.rows),
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(whole, 1):.0%})" if part else "0"


def show_schedule(plan: Schedule, batch: int, accumulated: int) -> None:
    """Print how long the run trains.

    Args:
        plan: The schedule.
        batch: Rows of a device's batch.
        accumulated: Batches that make a step.
    """
    parts = f": {accumulated} batches of {batch}" if accumulated > 1 else ""
    say("batch", f"{count(plan.batch, 'row')} a step{parts}")
    evaluated = f"; evaluated {count(plan.evaluations, 'time')}" if plan.evaluations else ""
    say(
        "steps",
        f"{plan.steps:,}: {plan.epochs:.3g} epochs of {plan.steps_per_epoch:,}; warm-up {plan.warmup:,}{evaluated}",
    )


def show_memory(estimate: Estimate, place: Place) -> None:
    """Print the parts of the memory estimate, with what there is beside it."""
    table = _table("memory, estimated")
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column("")
    for item in estimate.items:
        table.add_row(item.name, size_text(item.size), Text(item.how, style="dim"))
    table.add_section()
    table.add_row("training", size_text(estimate.training), "")
    for name, size in estimate.stages.items():
        table.add_row(name, size_text(size), "")
    fits = estimate.total <= place.room
    there = Text("fits" if fits else "does not fit", style="bold green" if fits else "bold red")
    table.add_section()
    table.add_row("most", size_text(estimate.total), there, style="bold")
    table.add_row("free now", size_text(place.free), f"on this {'CPU' if place.device.type == 'cpu' else 'GPU'}")
    console.print(table)


def show_time(found: Duration) -> None:
    """Print how long the run takes, and how that is known."""
    parts = ", ".join(f"{name} {time_text(seconds)}" for name, seconds in found.parts.items())
    say("time", f"about {time_text(found.total)}: {parts}")
    say("", f"from {found.source}")


COLUMNS = ("rows", "cut", "dropped", "steps", "tokens at once", "memory", "time")


def show_lines(lines: Sequence[Line], axes: Sequence[str], place: Place) -> None:
    """Print one line a trial.

    Args:
        lines: The trials.
        axes: The keys that vary.
        place: Where they would run.
    """
    unfit = sum(not line.fits for line in lines)
    title = count(len(lines), "trial") + (f", {unfit} of them cannot run" if unfit else "")
    table = _table(f"{title}; {size_text(place.free)} of memory free")
    for name in (*short_names(axes).values(), *COLUMNS):
        table.add_column(name, justify="right")
    table.add_column("")
    for line in lines:
        values = [line.axes[axis] for axis in axes]
        cells = [*line.cells, *[""] * (len(COLUMNS) - len(line.cells)), line.trouble]
        table.add_row(*map(Text, [*values, *cells]), style="" if line.fits else "bold red")
    console.print(table)


def line_cells(train: Effect, plan: Schedule, at_once: int, estimate: Estimate, found: Duration) -> tuple[str, ...]:
    """Return the cells of a trial, in the order of `COLUMNS`."""
    return (
        f"{train.rows - train.dropped:,}",
        f"{train.cut:,}",
        f"{train.dropped:,}",
        f"{plan.steps:,}",
        f"{at_once:,}",
        size_text(estimate.total),
        time_text(found.total),
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
