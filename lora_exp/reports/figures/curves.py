"""The metrics over the steps: the mean of a point's seeds, with its band."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_exp.reports.figures.base import (
    COLOURS,
    GREY,
    MOST_LINES,
    Figure,
    axis_title,
    label,
    layout,
    plain,
    with_interval,
)
from lora_exp.reports.page import Points, series_of
from lora_exp.sweeps.leaderboard import Interval, Leaderboard, Point, interval


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
