"""The terminal: a header, a table of the data, one progress bar with metrics lines, a closing table."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lora_exp.errors import count
from lora_exp.reports.figures.base import setting, short_names, with_interval
from lora_exp.reports.page import duration, number
from lora_exp.reports.results import RunResults
from lora_exp.secrets.masking import safe
from lora_exp.sweeps.leaderboard import Leaderboard, Point, summary
from lora_exp.text import visible

log = logging.getLogger(__name__)
RUN_WIDTH = 24
"""Characters of a table's last column, the runs' names, where the settings do not all have room."""
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
"""Prints names, rows and errors as they are: `[red]` is no markup here, and the hook below lets no ESC through."""


class _Visible:
    """A renderable whose control characters are shown instead of obeyed; rich's own stay."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class _ShowControlCharacters(RenderHook):
    """Makes everything that is printed `_Visible`."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(each) for each in renderables]


console.push_render_hook(_ShowControlCharacters())


def header(rows: Iterable[tuple[str, str]]) -> None:
    """Print what was composed: a name and its choice a line."""
    console.print()
    for name, choice in rows:
        say(name, choice)


def say(name: str, line: str) -> None:
    """Print one line under the header's names; the run's log file has it too."""
    line = safe(line)
    console.print(Text.assemble((f"{name:>9}  ", "bold cyan"), line))
    log.info("%s: %s", name, line)


def note(line: str) -> None:
    """Print something that the user should know and may act on."""
    line = safe(line)
    console.print(Text.assemble((f"{'note':>9}  ", "bold yellow"), line))
    log.info("note: %s", line)


def data_lines(reports: Mapping[str, Mapping[str, Any]], kept: Container[str] = ()) -> None:
    """Print what became of each split's rows, and of which an earlier run had made the token ids."""
    for split, report in reports.items():
        say(split, _data_line(report) + (" · from the cache" if split in kept else ""))
        if report["unended"]:
            rows = count(report["unended"], "row")
            note(f"{rows} of {split} with an answer that no special token ends: the model does not learn to stop there")


def _data_line(report: Mapping[str, Any]) -> str:
    rows = f"{report['format']} row".strip()
    parts = [count(report["kept"], rows)]
    if report["kept"] < report["rows"]:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in report["dropped"].items())
        parts[0] += f" of {report['rows']:,}"
        parts.append(f"dropped: {reasons}")
    if report["cut_prompts"]:
        parts.append(f"cut: {count(report['cut_prompts'], 'prompt')} ({report['cut_prompt_tokens']:,} tokens)")
    if report["cut_answers"]:
        parts.append(f"cut: {count(report['cut_answers'], 'answer')} ({report['cut_answer_tokens']:,} tokens)")
    if report["prompt_lengths"]:
        parts.append(f"prompts {_spread(report['prompt_lengths'])}, answers {_spread(report['answer_lengths'])} tokens")
    return " · ".join(parts)


def _spread(lengths: Mapping[str, float]) -> str:
    return f"{lengths['min']:g}/{lengths['median']:g}/{lengths['max']:g}"


class Steps:
    """A progress bar, on a terminal, for work before training; use as a context."""

    def __init__(self, name: str, total: int) -> None:
        columns = (TextColumn(f"{name:>9} "), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task(name, total=total)

    def __enter__(self) -> Steps:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self) -> None:
        """Move the bar by one."""
        self.progress.advance(self.task)


class TrainingDisplay:
    """One progress bar (on a terminal) and a line for every logged step.

    Args:
        headline: The metrics to show: the name they are logged under, and the name to show.
    """

    def __init__(self, headline: Mapping[str, str]) -> None:
        self.headline = headline
        self.total = 0
        self.progress: Progress | None = None
        self.started = time.perf_counter()
        self.first = 0

    def start(self, total: int, done: int) -> None:
        """Show the bar of a run with `total` steps, of which a resumed one has done some."""
        self.total, self.first, self.started = total, done, time.perf_counter()
        if console.is_terminal:
            self.progress = Progress(
                TextColumn(f"{'train':>9} "),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self.progress.add_task("train", total=total, completed=done)
            self.progress.start()

    def advance(self, step: int) -> None:
        """Move the bar to a step."""
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=step)

    def metrics(self, step: int, logs: Mapping[str, Any]) -> None:
        """Print the metrics line of a logged step: of training, or of an evaluation."""
        prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        shown = [f"{short} {logs[prefix + key]:.4g}" for key, short in self.headline.items() if prefix + key in logs]
        if not shown:
            return
        if not prefix and "learning_rate" in logs:
            shown.append(f"lr {logs['learning_rate']:.2g}")
            seconds = (time.perf_counter() - self.started) / max(step - self.first, 1)
            shown.append(f"{seconds:.2g} s/step" if seconds >= 1 else f"{1 / seconds:.3g} steps/s")
        say("eval" if prefix else "step", f"{step:>{len(str(self.total))}}/{self.total}  " + "  ".join(shown))

    def stop(self) -> None:
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def result_table(results: RunResults) -> None:
    """Print the closing table of a run: the numbers that matter, before and after, and where everything lies."""
    run, final, before = results.run, results.metrics, results.first_evaluation
    table = Table(
        title=f"{run.get('recipe') or 'run'} {run['status']}", title_justify="left", title_style="bold", box=SIMPLE_HEAD
    )
    table.add_column("")
    for column in ("before", "after") if before else ("",):
        table.add_column(column, justify="right")

    def row(name: str, last: str, first: str = "") -> None:
        table.add_row(name, *([first, last] if before else [last]))

    if "train_loss" in final:
        row("train loss", number(final["train_loss"]))
    for key, short in (run.get("headline") or {}).items():
        if f"eval_{key}" in final:
            first = number(before[f"eval_{key}"]) if f"eval_{key}" in before else ""
            row(f"eval {short}", number(final[f"eval_{key}"]), first)
    if "trainable_parameters" in run:
        row("trainable parameters", f"{run['trainable_parameters']:,}")
    if "peak_memory_bytes" in run:
        row("peak memory", f"{run['peak_memory_bytes'] / 2**20:,.0f} MiB")
    row("time", f"{sum(run['wall_times'].values()):.1f} s")
    console.print()
    console.print(table)
    if run.get("error"):
        say("error", run["error"])
    say("folder", str(results.folder))
    if (results.folder / "adapter").is_dir():
        say("adapter", str(results.folder / "adapter"))
    say("report", str(results.folder / "report.html"))


def leaderboard_table(board: Leaderboard, planned: int = 0, most: int = 20) -> None:
    """Print the points of a sweep, best first; those that go on or failed are marked and stand last.

    Args:
        board: The points.
        planned: How many trials the sweep means, where it goes on.
        most: Rows at most.
    """
    better = "less" if board.direction == "minimize" else "more"
    whole = f" of {planned:,}" if planned > len(board.trials) else ""
    title = f"{summary(board, whole)}; {board.objective_name or 'no objective'}, {better} is better"
    points = board.points
    # Of a long table the end is shown too: a failed trial must not pass unseen.
    shown = points if len(points) <= most else [*points[: most - 5], *points[-5:]]
    axes = _fitting(board, shown)
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("#", justify="right", no_wrap=True)
    for key in axes:
        table.add_column(short_names(board.axes)[key], justify="right")
    for name in ("objective", *board.further_objectives, "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    left_out = [key for key in board.axes if key not in axes]
    named = left_out or any("=" not in point.best.name for point in points)  # by something else than its settings
    if named:
        table.add_column("run", overflow="fold")
    for point in shown:
        cells = _point_cells(point, board, axes)
        table.add_row(*map(Text, cells if named else cells[:-1]), style=_style(point))
    console.print()
    console.print(table)
    if len(shown) < len(points):
        say("rows", f"{most - 5} best and 5 last of {len(points):,}; leaderboard.csv has all")
    if left_out:
        say("settings", f"this terminal is too narrow for {', '.join(left_out)}; the report has them")
    if board.tie and not whole:  # before the last trial it may still change
        say("best", board.tie) if board.told_apart else note(board.tie)


def _fitting(board: Leaderboard, points: Sequence[Point]) -> list[str]:
    """Return the axes, from the first on, for which the terminal is wide enough."""
    short = short_names(board.axes)
    fixed = ["#", "objective", *board.further_objectives, "status", "time"]
    cells = [_point_cells(point, board, [])[:-1] for point in points]
    widths = [max(len(text) for text in column) for column in zip(fixed, *cells, strict=True)]
    names = ["run", *(point.best.name for point in points)]
    run = 3 + min(RUN_WIDTH, max(map(len, names)))
    named = any("=" not in name for name in names[1:])
    room = console.width - 2 - sum(width + 3 for width in widths)
    each = [
        3 + max(len(short[key]), *(len(setting(point.axes.get(key, ""))) for point in points)) for key in board.axes
    ]
    if sum(each) <= (room - run if named else room):
        return list(board.axes)
    # What is left out stands in the runs' names.
    return [key for key, total in zip(board.axes, accumulate(each), strict=True) if total <= room - run]


def _point_cells(point: Point, board: Leaderboard, axes: Iterable[str]) -> list[str]:
    return [
        str(point.rank or "-"),
        *(setting(point.axes[key]) if key in point.axes else "" for key in axes),
        with_interval(point.objective) if point.objective else "",
        *(with_interval(found) if (found := point.metric(name)) else "" for name in board.further_objectives),
        point.status,
        duration(point.seconds) if point.seconds else "",
        point.best.name,
    ]


def _style(point: Point) -> str:
    states = {trial.status for trial in point.trials}
    if point.rank == 1:
        return "bold"
    return "red" if "failed" in states else "yellow" if states & {"running", "pruned"} else ""
