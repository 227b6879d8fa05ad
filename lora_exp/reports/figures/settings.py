"""The objective against each setting: every point that has a result, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_exp.reports.figures.base import (
    COLOURS,
    GREY,
    MOST_LINES,
    MOST_POINTS,
    MOST_VALUES,
    Figure,
    axis_title,
    label,
    layout,
    plain,
    setting,
    short_names,
    with_interval,
)
from lora_exp.sweeps.leaderboard import Interval, Leaderboard, Point, interval

MOST_LETTERS = 32
"""Of a name in a legend, so that it fits on a phone."""


def objective_figures(board: Leaderboard) -> list[Figure]:
    """Return a chart for each axis: every point that has a result, with its interval."""
    points = with_settings(board)[:MOST_POINTS]
    return [_objective_figure(board, key, points) for key in varied(board.axes, points)]


def with_settings(board: Leaderboard) -> list[Point]:
    """Return the points that have a result and whose settings are known: not those of a run that lost its config."""
    return [point for point in board.points if point.objective and point.axes.keys() >= set(board.axes)]


def varied(axes: Sequence[str], points: Sequence[Point]) -> list[str]:
    """Return the settings of which the points have more than one value: some differ in failed trials alone."""
    return [key for key in axes if len({setting(point.axes.get(key)) for point in points}) > 1]


def _objective_figure(board: Leaderboard, key: str, points: Sequence[Point]) -> Figure:
    others = short_names([other for other in varied(board.axes, points) if other != key])
    lines: dict[str, list[Point]] = {}
    for point in points:
        name = ", ".join(f"{short}={setting(point.axes[other])}" for other, short in others.items())
        lines.setdefault(name, []).append(point)
    place = placing([point.axes[key] for point in points])
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


def placing(values: Sequence[Any]) -> Placing:
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
