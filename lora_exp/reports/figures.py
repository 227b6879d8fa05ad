"""The charts of a sweep as Plotly figures: plain dictionaries, so that drawing needs the library in the page alone.

Line and dot colours are of middle lightness, to be read on white paper and on a dark screen. All other colours
come from the page's style sheet, which follows the reader's preference and the printer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

from lora_exp.reports.page import Points, duration, number, series_of
from lora_exp.sweeps.leaderboard import Interval, Leaderboard, Point, interval

COLOURS = ("#d9730d", "#2f7fc9", "#2e9e6b", "#9a6bc4", "#d1495b", "#1b94a4", "#a97142", "#b0589b")
"""The first is for the best."""
GREY = "#8b939c"

MOST_LINES = 8
"""Lines that colours still tell apart."""
MOST_VALUES = 20
"""Values of a setting that are worth a mean each."""
MOST_POINTS = 500
"""Points of a chart; a sweep of thousands shows its best."""
MOST_BARS = 30
MOST_LETTERS = 32
"""Of a name in a legend, so that it fits on a phone."""

MIN_GAP = 0.06
"""Between two numbers beside a column, as a part of its height."""

KL, ACCURACY, LOGPS = "eval_kl_chosen", "eval_rewards/accuracies", "eval_logps/chosen"


@dataclass(frozen=True)
class Figure:
    """One chart.

    Args:
        title: What it shows.
        words: The same for those who do not see it.
        data: Plotly's traces.
        layout: Plotly's layout.
        notes: What a reader should know of it.
        wide: Whether it takes the page's whole width.
        min_width: In rem: on a narrower screen the reader pans.
    """

    title: str
    words: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    wide: bool = False
    min_width: int = 0


def layout(x: Mapping[str, Any], y: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return what all charts have in common."""
    axis = {
        "zeroline": False,
        "automargin": True,
        "fixedrange": False,
        "ticks": "outside",
        "ticklen": 4,
        "exponentformat": "e",
    }
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", "size": 12},
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "hovermode": "closest",
        "dragmode": False,
        "showlegend": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "xaxis": {**axis, **x},
        "yaxis": {**axis, **y},
        **more,
    }


def axis_title(text: str) -> dict[str, Any]:
    """Return an axis' title, standing off its numbers."""
    return {"title": {"text": plain(text), "standoff": 10}}


def plain(text: Any) -> str:
    """Return text of which Plotly makes no markup: it reads a few HTML tags in its labels."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# Names -----------------------------------------------------------------------------------------------


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return each config key by its last part, or whole where two would be the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def setting(value: Any) -> str:
    """Return a config value as a label: as one would write it, and short."""
    if isinstance(value, float):
        return f"{value:g}"
    text = {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
    return text if len(text) <= 40 else f"{text[:18]}…{text[-18:]}"


def label(point: Point) -> str:
    """Return a point's rank and settings in a line, or its run's name where no setting differs."""
    short = short_names(list(point.axes))
    settings = ", ".join(f"{short[key]}={setting(value)}" for key, value in point.axes.items())
    return f"{f'#{point.rank} ' if point.rank else ''}{settings or point.trials[0].name}"


def with_interval(value: Interval) -> str:
    """Return `0.81 ± 0.02`, or the value alone."""
    return number(value.mean) if value.half is None else f"{number(value.mean)} ± {value.half:.2g}"


# The objective against each setting ------------------------------------------------------------------


def objective_figures(board: Leaderboard) -> list[Figure]:
    """Return a chart for each axis: every point that has a result, with its interval."""
    points = [point for point in board.points if point.objective][:MOST_POINTS]
    return [_objective_figure(board, key, points) for key in varied(board.axes, points)]


def varied(axes: Sequence[str], points: Sequence[Point]) -> list[str]:
    """Return the settings of which the points have more than one value: some differ in failed trials alone."""
    return [key for key in axes if len({setting(point.axes.get(key)) for point in points}) > 1]


def _objective_figure(board: Leaderboard, key: str, points: Sequence[Point]) -> Figure:
    others = short_names([other for other in varied(board.axes, points) if other != key])
    lines: dict[str, list[Point]] = {}
    for point in points:
        name = ", ".join(f"{short}={setting(point.axes[other])}" for other, short in others.items())
        lines.setdefault(name, []).append(point)
    place = _placing([point.axes[key] for point in points])
    if len(lines) <= MOST_LINES:
        data = [_settings_line(name, found, key, place, COLOURS[n]) for n, (name, found) in enumerate(lines.items())]
    else:
        data = [_settings_dots(points, key, place)]
        # Of a setting that was drawn at random, each value stands alone.
        data += [_settings_mean(points, key, place)] if len(_by_value(points, key)) <= MOST_VALUES else []
    limits, cut = _range(points)
    drawn = layout(
        {**axis_title(key), **place.axis},
        {**axis_title(board.objective_name), "range": limits},
        showlegend=len(data) > 1,
    )
    notes = ["Intervals that reach beyond the chart are cut off."] if cut else []
    return Figure(f"{board.objective_name} by {key}", _words(board, key, points), data, drawn, notes)


def _words(board: Leaderboard, key: str, points: Sequence[Point]) -> str:
    parts = [f"{setting(value)}: {with_interval(found)}" for value, found in _by_value(points, key)]
    return f"{board.objective_name} by {key}: " + "; ".join(parts[:20])


def _by_value(points: Sequence[Point], key: str) -> list[tuple[Any, Interval]]:
    """Return the mean over all points with one value of a setting, value by value."""
    values: dict[Any, list[float]] = {}
    for point in sorted(points, key=lambda p: order(p.axes[key])):
        if point.objective:
            values.setdefault(setting(point.axes[key]), []).append(point.objective.mean)
    return [(value, found) for value, means in values.items() if (found := interval(means))]


def order(value: Any) -> tuple[bool, float, str]:
    """Return the key to sort settings by: numbers by size, then names."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (not is_number, float(value) if is_number else 0.0, str(value))


@dataclass(frozen=True)
class Placing:
    """Where the values of a setting stand along an axis.

    Args:
        axis: Plotly's settings of the axis.
        at: From a value to its place.
    """

    axis: Mapping[str, Any]
    at: Callable[[Any], Any]


def _placing(values: Sequence[Any]) -> Placing:
    """Return an axis of numbers, logarithmic where they span a decade, or of names."""
    distinct = sorted({setting(value): value for value in values}.values(), key=order)
    numbers = [value for value in distinct if not order(value)[0]]
    if len(numbers) < len(distinct):
        return Placing({"type": "category", "categoryarray": [plain(setting(v)) for v in distinct]}, _category)
    axis: dict[str, Any] = {"type": "log" if numbers[0] > 0 and numbers[-1] >= 10 * numbers[0] else "linear"}
    if len(numbers) <= MOST_LINES:
        axis |= {"tickvals": numbers, "ticktext": [setting(value) for value in numbers]}
    return Placing(axis, lambda value: value)


def _category(value: Any) -> str:
    return plain(setting(value))


def _settings_line(name: str, points: Sequence[Point], key: str, place: Placing, colour: str) -> dict[str, Any]:
    ordered = sorted(points, key=lambda point: order(point.axes[key]))
    return _dots(ordered, [place.at(point.axes[key]) for point in ordered], colour) | {
        "name": plain(name if len(name) <= MOST_LETTERS else f"{name[:MOST_LETTERS]}…"),
        "mode": "lines+markers",
        "line": {"color": colour, "width": 1.75},
    }


def _settings_dots(points: Sequence[Point], key: str, place: Placing) -> dict[str, Any]:
    drawn = _dots(points, [place.at(point.axes[key]) for point in points], GREY) | {"name": "each point"}
    del drawn["error_y"]
    return drawn | {"marker": {"color": GREY, "size": 5, "opacity": 0.5}}


def _settings_mean(points: Sequence[Point], key: str, place: Placing) -> dict[str, Any]:
    means = _by_value(points, key)
    raw = {setting(point.axes[key]): point.axes[key] for point in points}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "mean over the other settings",
        "x": [place.at(raw[value]) for value, _ in means],
        "y": [found.mean for _, found in means],
        "error_y": _error_bars([found for _, found in means], COLOURS[0]),
        "text": [plain(f"{key}={value}: {with_interval(found)}") for value, found in means],
        "hoverinfo": "text",
        "line": {"color": COLOURS[0], "width": 1.75},
        "marker": {"color": COLOURS[0], "size": 8},
    }


def _dots(points: Sequence[Point], x: Sequence[Any], colour: str) -> dict[str, Any]:
    values = [point.objective for point in points if point.objective]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": [value.mean for value in values],
        "error_y": _error_bars(values, colour),
        "text": [plain(f"{label(p)}: {with_interval(v)}") for p, v in zip(points, values, strict=True)],
        "hoverinfo": "text",
        "marker": {"color": colour, "size": 8},
    }


def _error_bars(values: Sequence[Interval], colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "array": [value.half for value in values],
        "color": colour,
        "thickness": 1.25,
        "width": 4,
        "visible": any(value.half for value in values),
    }


def _range(points: Sequence[Point]) -> tuple[list[float], bool]:
    """Return what to show of the objective, and whether an interval is cut.

    The interval of two seeds is often twenty times as wide as the two lie apart: drawn whole, it would leave the
    means in one place.
    """
    values = [trial.objective or 0.0 for point in points for trial in point.results]
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    ends = [end for p in points if p.objective for end in (p.objective.low, p.objective.high) if end is not None]
    shown_low, shown_high = max(min([low, *ends]), low - 0.6 * span), min(max([high, *ends]), high + 0.6 * span)
    cut = any(not shown_low <= end <= shown_high for end in ends)
    return [shown_low - 0.06 * span, shown_high + 0.06 * span], cut


# Parallel coordinates --------------------------------------------------------------------------------


def parallel_figure(board: Leaderboard) -> Figure | None:
    """Return a line a point across all settings and the objective; None of fewer than two settings."""
    points = [point for point in board.points if point.objective][:MOST_POINTS]
    axes = varied(board.axes, points)
    if len(axes) < 2:
        return None
    columns = [*axes, board.objective_name]
    rows = [[*(point.axes[key] for key in axes), point.objective.mean] for point in points if point.objective]
    scales = [_scale([row[n] for row in rows]) for n in range(len(columns))]
    groups = [
        ("the other points", points[10:], GREY, 1.0, 0.35),
        ("the next nine", points[1:10], COLOURS[1], 1.5, 0.8),
        ("the best", points[:1], COLOURS[0], 3.0, 1.0),
    ]
    data = [_parallel_lines(*group, rows=rows, scales=scales) for group in groups if group[1]]
    marks = [
        {
            "x": n,
            "y": at,
            "text": plain(text),
            "showarrow": False,
            "xanchor": "left",
            "xshift": 4,
            "bgcolor": "rgba(255,255,255,0.7)",
        }
        for n, scale in enumerate(scales)
        for text, at in scale.ticks
    ]
    names = [*short_names(axes).values(), board.objective_name.removeprefix("eval_")]
    drawn = layout(
        {
            "tickvals": list(range(len(columns))),
            "ticktext": [plain(name) for name in names],
            "range": [-0.1, len(columns) - 0.55],
            "side": "top",
            "ticks": "",
        },
        {"visible": False, "range": [-0.06, 1.06]},
        annotations=marks,
        showlegend=True,
        legend={
            "orientation": "h",
            "x": 0,
            "y": -0.02,
            "yanchor": "top",
            "bgcolor": "rgba(0,0,0,0)",
            "traceorder": "reversed",
        },
    )
    words = f"A line a point across {', '.join(columns)}. The best: {label(points[0])}"
    return Figure("All settings at once", words, data, drawn, wide=True, min_width=6 * len(columns))


@dataclass(frozen=True)
class Scale:
    """A column of the parallel coordinates: places from 0 to 1, and what stands beside them."""

    at: Callable[[Any], float]
    ticks: list[tuple[str, float]]


def _scale(values: Sequence[Any]) -> Scale:
    placing = _placing(values)
    distinct = sorted({setting(value): value for value in values}.values(), key=order)
    if placing.axis["type"] == "category":
        names = {setting(value): n / max(len(distinct) - 1, 1) for n, value in enumerate(distinct)}
        return Scale(lambda value: names[setting(value)], list(names.items())[:: math.ceil(len(names) * MIN_GAP)])
    bend = math.log if placing.axis["type"] == "log" else float
    low, high = bend(distinct[0]), bend(distinct[-1])

    def at(value: Any) -> float:
        return (bend(value) - low) / (high - low) if high > low else 0.5

    places = [at(value) for value in distinct]
    if len(distinct) <= 5 and all(right - left > MIN_GAP for left, right in pairwise(places)):
        return Scale(at, [(f"{value:.4g}", place) for value, place in zip(distinct, places, strict=True)])
    unbend = math.exp if bend is math.log else float
    quarters = [low + (high - low) * n / 4 for n in range(5)]
    return Scale(at, [(f"{unbend(quarter):.4g}", n / 4) for n, quarter in enumerate(quarters)])


def _parallel_lines(
    name: str,
    points: Sequence[Point],
    colour: str,
    width: float,
    opacity: float,
    *,
    rows: Sequence[Sequence[Any]],
    scales: Sequence[Scale],
) -> dict[str, Any]:
    """Return the lines of some points as one trace, a gap after each."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for point in points:
        row = rows[(point.rank or 1) - 1]
        words = plain(f"{label(point)}: {with_interval(point.objective)}" if point.objective else label(point))
        x += [*range(len(scales)), None]
        y += [*(scale.at(value) for scale, value in zip(scales, row, strict=True)), None]
        text += [words] * (len(scales) + 1)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": x,
        "y": y,
        "text": text,
        "hoverinfo": "text",
        "opacity": opacity,
        "line": {"color": colour, "width": width},
        "marker": {"color": colour, "size": 5},
    }


# Reward against distance from the reference ----------------------------------------------------------


def frontier_figure(board: Leaderboard) -> Figure | str | None:
    """Return how often the chosen answer is preferred against how far the model has moved from the reference.

    Returns:
        A chart; a sentence on what is missing for it; None where the runs know no reward.
    """
    points = [point for point in board.points if point.metric(ACCURACY)][:MOST_POINTS]
    if not points:
        return None
    with_kl = [(point, found) for point in points if (found := point.metric(KL))]
    with_shift = [(point, found) for point in points if (found := interval(_shifts(point)))]
    if with_kl:
        title, x_title, moved = (
            "Reward against KL",
            "KL to the reference, nats a token",
            with_kl,
        )
        notes = []
    elif with_shift:
        title, moved = "Reward against shift", with_shift
        x_title = "shift of log-probability, nats an answer"
        notes = [f"The runs did not log {KL}: the shift of {LOGPS} since before the first step stands in for it."]
    else:
        return f"Reward against KL is not drawn: no run has {KL}, nor {LOGPS} before the first step and at the end."
    data = _frontier_traces(moved)
    drawn = layout(axis_title(x_title), axis_title("reward accuracy"), showlegend=True)
    best = ", ".join(label(point) for point, _, _ in _pareto(moved))
    return Figure(title, f"{title}: the frontier holds {best}", data, drawn, notes, wide=True)


def _shifts(point: Point) -> list[float]:
    """Return how far each trial moved the log-probability of the chosen answers, either way."""
    ends = [[value for _, value in series_of(trial.steps, LOGPS) if value is not None] for trial in point.results]
    return [abs(values[-1] - values[0]) for values in ends if len(values) > 1]


def _pareto(moved: Sequence[tuple[Point, Interval]]) -> list[tuple[Point, float, float]]:
    """Return the points of which no other has both more reward and less distance."""
    found: list[tuple[Point, float, float]] = []
    rewarded = [(point, x.mean, y.mean) for point, x in moved if (y := point.metric(ACCURACY))]
    for point, distance, reward in sorted(rewarded, key=lambda item: (item[1], -item[2])):
        if not found or reward > found[-1][2]:
            found.append((point, distance, reward))
    return found


def _frontier_traces(moved: Sequence[tuple[Point, Interval]]) -> list[dict[str, Any]]:
    front = _pareto(moved)
    rewards = [(point, x, y) for point, x in moved if (y := point.metric(ACCURACY))]
    few = len(rewards) <= MOST_LINES
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "frontier: most reward for the distance",
            "x": [x for _, x, _ in front],
            "y": [y for _, _, y in front],
            "hoverinfo": "skip",
            "line": {"color": GREY, "width": 1.5, "dash": "dot", "shape": "hv"},
        },
        {
            "type": "scatter",
            "mode": "markers+text" if few else "markers",
            "name": "a point",
            "x": [x.mean for _, x, _ in rewards],
            "y": [y.mean for _, _, y in rewards],
            "text": [f"#{point.rank}" for point, _, _ in rewards],
            "textposition": "top center",
            "cliponaxis": False,
            "hovertext": [
                plain(f"{label(p)}: accuracy {with_interval(y)}, moved {with_interval(x)}") for p, x, y in rewards
            ],
            "hoverinfo": "text",
            "marker": {
                "color": [COLOURS[0] if point.rank == 1 else COLOURS[1] for point, _, _ in rewards],
                "size": 9 if few else 6,
            },
        },
    ]


# Curves ----------------------------------------------------------------------------------------------


def curve_figures(board: Leaderboard) -> list[Figure]:
    """Return a chart of each headline metric over the steps, for the best points and those without a result."""
    headline: dict[str, str] = {}
    for trial in board.trials:
        headline |= {key: short for key, short in (trial.run.get("headline") or {}).items() if key not in headline}
    return [figure for key, short in headline.items() if (figure := _curve_figure(board, key, short))]


def _curve_figure(board: Leaderboard, key: str, short: str) -> Figure | None:
    ranked = [point for point in board.points if point.objective][:MOST_LINES]
    rest = [point for point in board.points if not point.objective][:MOST_LINES]
    names = [label(point) if len(ranked) <= 3 else f"#{point.rank}" for point in ranked]
    data = [
        trace
        for point, name, colour in zip(ranked, names, COLOURS, strict=False)
        for trace in _curve_traces(point, key, name, colour)
    ]
    grey = [trace for point in rest for trace in _curve_traces(point, key, "without a result", GREY)]
    data += [{**trace, "showlegend": trace is grey[0]} for trace in grey]
    if not data:
        return None
    limits = _curve_range(data)
    drawn = layout(
        {**axis_title("step"), "rangemode": "tozero"}, {**axis_title(short), "range": limits}, showlegend=True
    )
    notes = []
    if len(ranked) < sum(point.objective is not None for point in board.points):
        notes.append(f"The best {len(ranked)} points.")
    return Figure(f"{short} over the steps", f"{short} over the steps, a line a point", data, drawn, notes)


def _curve_range(data: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return what to show of the values: every line whole, of a wide band as much as has room."""
    lines = [value for trace in data if "fill" not in trace for value in trace["y"]]
    bands = [value for trace in data if "fill" in trace for value in trace["y"]]
    low, high = min(lines), max(lines)
    room = 0.3 * ((high - low) or abs(high) or 1.0)
    low, high = max(min([low, *bands]), low - room), min(max([high, *bands]), high + room)
    return [low - 0.15 * room, high + 0.15 * room]


def _curve_traces(point: Point, key: str, name: str, colour: str) -> list[dict[str, Any]]:
    """Return the mean over a point's seeds: training dotted, validation with dots and its 95 % band."""
    trials = point.results or point.trials
    train = _mean_curve(series_of(trial.steps, key) for trial in trials)
    evaluation = _mean_curve(series_of(trial.steps, f"eval_{key}") for trial in trials)
    words = label(point) if point.rank else f"{point.status}: {label(point)}"
    # Of a single value there is no line.
    dotted = {
        "mode": "lines" if len(train) > 1 else "markers",
        "line": {"color": colour, "width": 1.25, "dash": "dot"},
        "marker": {"color": colour, "size": 4},
    }
    traces = [_curve(name, f"{words}\ntraining", train, dotted)] if train else []
    if evaluation:
        traces += [_band(evaluation, name, colour)] if any(found.half for _, found in evaluation) else []
        line = {"color": colour, "width": 2}
        style = {"mode": "lines+markers", "line": line, "marker": {"color": colour, "size": 6}}
        traces.append(_curve(name, f"{words}\nvalidation", evaluation, style))
    return [{**trace, "showlegend": trace is traces[-1]} for trace in traces]


def _mean_curve(series: Iterable[Points]) -> list[tuple[int, Interval]]:
    """Return the mean at the steps that every trial logged."""
    found = [{step: value for step, value in points if value is not None} for points in series]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    curve = [(step, interval([values[step] for values in found])) for step in steps]
    return [(step, value) for step, value in curve if value]


def _curve(name: str, words: str, points: Sequence[tuple[int, Interval]], style: Mapping[str, Any]) -> dict[str, Any]:
    lead = plain(words).replace("\n", "<br>")
    return {
        "type": "scatter",
        "name": plain(name),
        "legendgroup": plain(name),
        "x": [step for step, _ in points],
        "y": [value.mean for _, value in points],
        "text": [f"{lead}, step {step:,}: {with_interval(value)}" for step, value in points],
        "hoverinfo": "text",
        **style,
    }


def _band(points: Sequence[tuple[int, Interval]], name: str, colour: str) -> dict[str, Any]:
    steps = [step for step, _ in points]
    high = [value.mean if value.high is None else value.high for _, value in points]
    low = [value.mean if value.low is None else value.low for _, value in points]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plain(name),
        "legendgroup": plain(name),
        "x": [*steps, *reversed(steps)],
        "y": [*high, *reversed(low)],
        "fill": "toself",
        "fillcolor": f"{colour}22",
        "line": {"width": 0, "color": colour},
        "hoverinfo": "skip",
    }


# Time and memory -------------------------------------------------------------------------------------


def cost_figures(board: Leaderboard) -> list[Figure]:
    """Return where the time went, and the memory, of the best points."""
    points = [point for point in board.points if point.objective][:MOST_BARS]
    notes = [f"The best {MOST_BARS} points."] if len(points) == MOST_BARS else []
    if not points:
        return []
    ranks = [f"#{point.rank}" for point in points]
    stages = dict.fromkeys(stage for point in points for trial in point.results for stage in trial.wall_times)
    time = [
        _bars(stage, ranks, points, [_stage(point, stage) for point in points], colour, duration)
        for stage, colour in zip(stages, (*COLOURS[1:], GREY, *COLOURS), strict=False)
    ]
    figures = []
    rank = {**axis_title("rank"), "type": "category"}
    if stages:
        words = "; ".join(f"{label(p)}: {duration(p.seconds or 0)}" for p in points[:10])
        drawn = layout(rank, {**axis_title("seconds, mean over the seeds"), "rangemode": "tozero"}, barmode="stack")
        figures.append(Figure("Time by stage", f"Time: {words}", time, {**drawn, "showlegend": True}, notes))
    memory = [(point.peak_memory_bytes or 0) / 2**20 for point in points]
    if any(memory):
        bars = _bars("peak memory", ranks, points, memory, COLOURS[1], lambda value: f"{value:,.0f} MiB")
        words = "; ".join(f"{label(p)}: {size:,.0f} MiB" for p, size in zip(points[:10], memory, strict=False))
        figures.append(
            Figure(
                "Peak memory",
                f"Peak memory: {words}",
                [bars],
                layout(rank, axis_title("MiB, mean over the seeds")),
                notes,
            )
        )
    return figures


def _stage(point: Point, stage: str) -> float:
    return fmean(trial.wall_times.get(stage, 0.0) for trial in point.results)


def _bars(
    name: str,
    ranks: Sequence[str],
    points: Sequence[Point],
    values: Sequence[float],
    colour: str,
    words: Callable[[float], str],
) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": plain(name),
        "x": list(ranks),
        "y": list(values),
        "text": [plain(f"{label(p)}: {name} {words(v)}") for p, v in zip(points, values, strict=True)],
        "hoverinfo": "text",
        "textposition": "none",
        "marker": {"color": colour},
    }
