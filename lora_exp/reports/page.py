"""The page of a run: `report.html`, one file that needs nothing else, from what lies in the run folder.

Python computes every number and every point here; `run.html.j2` only sets them out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from lora_exp import text
from lora_exp.reports.results import RunResults, read_results
from lora_exp.run_folder import read_jsonl, write_whole

REMOTE_CODE = "the model brings code of its own, which may run here: model.trust_remote_code=true"
TEMPLATES = Path(__file__).parent
PAGE = "report.html"

Points = Sequence[tuple[int, float | None]]
"""A value at each logged step; None is a gap."""


def write_page(folder: Path) -> Path:
    """Write `report.html` of a run folder from whatever is there of its files; `run.json` alone is enough.

    Raises:
        UserError: If the folder holds no run.
    """
    page = folder / PAGE
    write_whole(page, render("run.html.j2", page_facts(folder)))
    return page


def render(template: str, facts: Mapping[str, Any]) -> str:
    """Return a page, all text in it escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "duration": duration, "number": number, "memory": memory}
    return environment.get_template(template).render(facts) + "\n"


def page_facts(folder: Path) -> dict[str, Any]:
    """Return what the template shows."""
    results = read_results(folder)
    run, config = results.run, _text(folder / "config.yaml")
    choices = {group: option for group, option in (run.get("choices") or {}).items() if option is not None}
    headline = run.get("headline") or {"loss": "loss"}
    splits = _json(folder / "data_report.json")
    return {
        "status": run.get("status") or "unknown",
        "error": run.get("error"),
        "recipe": run.get("recipe") or choices.get("recipe") or "run",
        "model": run.get("model") or choices.get("model") or "",
        "remote_code": REMOTE_CODE if run.get("trust_remote_code") else "",
        "choices": choices,
        "folder": str(folder),
        "started": run.get("started") or "",
        "started_text": _moment(run.get("started") or ""),
        "key_numbers": key_numbers(results, headline),
        "charts": charts(results.steps, headline),
        "area": AREA,
        "splits": list(splits),
        "data_rows": data_rows(splits.values()),
        "samples": read_jsonl(folder / "samples.jsonl"),
        "stages": stages(run.get("wall_times") or {}),
        "machine": machine(run),
        "versions": run.get("versions") or {},
        "metrics": results.metrics,
        "config": config,
    }


# Charts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Area:
    """The plot inside the drawing, in SVG units: the axes' labels stand left of it and below it."""

    width: int = 400
    height: int = 240
    left: int = 60
    right: int = 382
    top: int = 12
    bottom: int = 200


AREA = Area()


@dataclass(frozen=True)
class Mark:
    """A place in the drawing with its words: a point, or a tick (of which one coordinate counts)."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """One series.

    Args:
        name: `train` or `eval`.
        strokes: The stretches between gaps, each as an SVG `points` attribute.
        dots: Points shown by themselves: every evaluation, and a training value with a gap on both sides.
    """

    name: str
    strokes: list[str]
    dots: list[Mark]


@dataclass(frozen=True)
class Chart:
    """One metric over the steps.

    Args:
        title: Its short name.
        lines: Without any, the metric was logged but never as a number.
        x_ticks: Along the steps.
        y_ticks: Along the values.
        gaps: How many logged values were no number.
        words: What it shows, for those who do not see it.
    """

    title: str
    lines: list[Line]
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    gaps: int
    words: str


def charts(steps: Sequence[Mapping[str, Any]], headline: Mapping[str, str]) -> list[Chart]:
    """Return a chart for each headline metric that was logged."""
    found = []
    for key, short in headline.items():
        series = {"train": series_of(steps, key), "eval": series_of(steps, f"eval_{key}")}
        if any(series.values()):
            found.append(draw(short, series))
    return found


def series_of(steps: Iterable[Mapping[str, Any]], key: str) -> Points:
    """Return a metric's values in the order of the steps.

    A step's first value counts: `load_best_model_at_end` evaluates the best checkpoint once more after the
    last step, and that value belongs to an earlier one.
    """
    values: dict[int, float | None] = {}
    for line in steps:
        if key in line:
            values.setdefault(int(line["step"]), _plottable(line[key]))
    return sorted(values.items())


def draw(title: str, series: Mapping[str, Points]) -> Chart:
    """Place the series of one metric in the plot area."""
    values = [value for points in series.values() for _, value in points if value is not None]
    gaps = sum(value is None for points in series.values() for _, value in points)
    if not values:
        return Chart(title, [], [], [], gaps, title)
    end = max(step for points in series.values() for step, _ in points) or 1
    ticks = round_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def place(step: float, value: float, label: str = "") -> Mark:
        x = AREA.left + (AREA.right - AREA.left) * step / end
        y = AREA.bottom - (AREA.bottom - AREA.top) * (value - low) / (high - low)
        return Mark(round(x, 1), round(y, 1), label)

    return Chart(
        title,
        [_line(name, points, place) for name, points in series.items() if points],
        [place(tick, low, f"{tick:,.0f}") for tick in round_ticks(0, end) if tick <= end and tick == int(tick)],
        [place(0, tick, tick_label(tick, ticks[1] - ticks[0])) for tick in ticks],
        gaps,
        f"{title} over the steps: " + ", ".join(_course(name, points) for name, points in series.items() if points),
    )


def _line(name: str, points: Points, place: Callable[[float, float, str], Mark]) -> Line:
    stretches = [
        [place(step, value, f"{name}, step {step:,}: {number(value)}") for step, value in stretch if value is not None]
        for is_gap, stretch in groupby(points, key=lambda point: point[1] is None)
        if not is_gap
    ]
    strokes = [" ".join(f"{mark.x:g},{mark.y:g}" for mark in stretch) for stretch in stretches if len(stretch) > 1]
    dots = [mark for stretch in stretches for mark in stretch if name == "eval" or len(stretch) == 1]
    return Line(name, strokes, dots)


def _course(name: str, points: Points) -> str:
    return f"{name} from {number(points[0][1])} to {number(points[-1][1])}"


def round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return evenly spaced round numbers, the first at or below `low` and the last at or above `high`."""
    scale = max(abs(low), abs(high), 1e-9)
    if high - low < 1e-4 * scale:  # a flat line, whose noise would take more digits than a label has room for
        low, high = low - 0.1 * scale, high + 0.1 * scale
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    times = next(times for times in (1, 2, 5, 10, 20) if times * unit >= rough)
    step = times * unit
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if unit >= 1:
        return [index * step for index in range(first, last + 1)]
    # By division, as 3 * 0.1 is not 0.3.
    return [index * times / round(1 / unit) for index in range(first, last + 1)]


def tick_label(value: float, step: float) -> str:
    """Return a tick's number, with as many decimals as tell it from its neighbours."""
    if step < 1e-6 or abs(value) >= 1e5:
        return f"{value:.4g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"


def _plottable(value: Any) -> float | None:
    # Beyond any metric that means something, and near where the arithmetic of a plot overflows.
    usable = isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e100
    return float(value) if usable else None


# Numbers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyNumber:
    """One of the numbers at the top.

    Args:
        name: What it is.
        value: It.
        before: What it was before the first step; empty where nobody looked.
        detail: A word on it, small.
    """

    name: str
    value: str
    before: str = ""
    detail: str = ""


def key_numbers(results: RunResults, headline: Mapping[str, str]) -> list[KeyNumber]:
    """Return what a reader wants first; a number that the run does not have is left out."""
    run = results.run
    found = []
    if run.get("objective") is not None:
        name = run.get("objective_name") or ""
        found.append(KeyNumber("objective", number(run["objective"]), detail=name))
    found += [item for key, short in headline.items() if (item := _final(results, key, short))]
    if run.get("wall_times"):
        found.append(KeyNumber("time", duration(sum(run["wall_times"].values()))))
    if run.get("peak_memory_bytes"):
        found.append(KeyNumber("peak memory", memory(run["peak_memory_bytes"])))
    if run.get("trainable_parameters") is not None:
        found.append(KeyNumber("trainable parameters", f"{run['trainable_parameters']:,}"))
    return found


def _final(results: RunResults, key: str, short: str) -> KeyNumber | None:
    """Return a metric's last value: of the evaluation, or of training where there was none."""
    name = f"eval_{key}"
    evaluations = series_of(results.steps, name)
    if name in results.metrics or evaluations:
        last = results.metrics[name] if name in results.metrics else evaluations[-1][1]
        before = results.first_evaluation.get(name)
        return KeyNumber(f"eval {short}", number(last), "" if before is None else number(before))
    training = series_of(results.steps, key)
    return KeyNumber(f"train {short}", number(training[-1][1])) if training else None


def number(value: Any) -> str:
    """Return a metric to four digits, and a count (of tokens, of operations) in full."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "no number"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return `2.4 s`, `3 min 05 s` or `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def memory(size: float) -> str:
    """Return `1.4 GiB` or `300 MiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


# Tables ----------------------------------------------------------------------------------------------


def data_rows(reports: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the data table: a fact a row, a split a column, so that it fits on a phone."""
    cells: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "rows": lambda report: _count(report.get("rows")),
        "kept": lambda report: _count(report.get("kept")),
        "dropped": lambda report: "\n".join(f"{n:,} {why}" for why, n in (report.get("dropped") or {}).items()) or "0",
        "prompts cut": lambda report: _cut(report, "prompt"),
        "answers cut": lambda report: _cut(report, "answer"),
        "prompt tokens": lambda report: _spread(report.get("prompt_lengths")),
        "answer tokens": lambda report: _spread(report.get("answer_lengths")),
        "format": lambda report: str(report.get("format") or ""),
        "found": _found,
        "source": lambda report: str(report.get("source") or ""),
    }
    splits = list(reports)
    return [(name, [cell(report) for report in splits]) for name, cell in cells.items()]


def _found(report: Mapping[str, Any]) -> str:
    findings = report.get("findings") or {}
    return "\n".join(f"{found['rows']:,} {name.replace('_', ' ')}" for name, found in findings.items()) or "nothing"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _cut(report: Mapping[str, Any], part: str) -> str:
    cut, tokens = report.get(f"cut_{part}s") or 0, report.get(f"cut_{part}_tokens") or 0
    return f"{cut:,} ({tokens:,} tokens)" if cut else "0"


def _spread(lengths: Mapping[str, float] | None) -> str:
    return " / ".join(f"{lengths[name]:,g}" for name in ("min", "median", "max")) if lengths else ""


def stages(wall_times: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Return each stage with its time and its percentage of the whole."""
    whole = sum(wall_times.values()) or 1.0
    return [(name, duration(seconds), round(100 * seconds / whole, 1)) for name, seconds in wall_times.items()]


def machine(run: Mapping[str, Any]) -> dict[str, str]:
    """Return what the run ran on and with."""
    device, reference, git = run.get("device") or {}, run.get("reference") or {}, run.get("git") or {}
    facts = {
        "device": ", ".join(str(device[name]) for name in ("name", "type") if device.get(name)),
        "threads": str(device.get("threads") or ""),
        "adapter on": " ".join(run.get("target_modules") or []),
        "reference": _reference(reference) if reference.get("model") else "",
        "commit": f"{git.get('commit', '')}{' and changes since' if git.get('dirty') else ''}" if git else "",
    }
    return {name: value for name, value in facts.items() if value}


def _reference(facts: Mapping[str, Any]) -> str:
    return f"{facts['model']}: {facts.get('computed', 0):,} rows computed, {facts.get('reused', 0):,} reused"


# Files and text --------------------------------------------------------------------------------------


def visible(value: Any) -> str:
    """Return text with its control characters made visible, and without the line breaks at its end."""
    return text.visible(str(value)).rstrip("\n")


def _moment(started: str) -> str:
    try:
        return datetime.fromisoformat(started).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return started


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(_text(path) or "{}"))
