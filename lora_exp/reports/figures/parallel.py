"""Parallel coordinates: a line a point across all settings and the objective.

Drawn as plain lines, since Plotly's own are WebGL: blurred in print, unreadable on a phone, and in need of a policy
that lets text become code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lora_exp.reports.figures.base import (
    COLOURS,
    GREY,
    MOST_POINTS,
    Figure,
    label,
    layout,
    plain,
    setting,
    short_names,
    with_interval,
)
from lora_exp.reports.figures.settings import order, placing, varied, with_settings
from lora_exp.sweeps.leaderboard import Leaderboard, Point

MIN_GAP = 0.06
"""Between two numbers beside a column, as a part of its height."""


def parallel_figure(board: Leaderboard) -> Figure | None:
    """Return a line a point across all settings and the objective; None of fewer than two settings."""
    points = with_settings(board)[:MOST_POINTS]
    axes = varied(board.axes, points)
    if len(axes) < 2:
        return None
    columns = [*axes, board.objective_name]
    rows = {
        point.rank: [*(point.axes[key] for key in axes), point.objective.mean] for point in points if point.objective
    }
    scales = [_scale([row[n] for row in rows.values()]) for n in range(len(columns))]
    groups = [
        ("the other points", [point for point in points if (point.rank or 0) > 10], GREY, 1.0, 0.35),
        ("the next nine", [point for point in points if 1 < (point.rank or 0) <= 10], COLOURS[1], 1.5, 0.8),
        ("the best", [point for point in points if point.rank == 1], COLOURS[0], 3.0, 1.0),
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
    placed = placing(values)
    distinct = sorted({setting(value): value for value in values}.values(), key=order)
    if placed.axis["type"] == "category":
        names = {setting(value): n / max(len(distinct) - 1, 1) for n, value in enumerate(distinct)}
        return Scale(lambda value: names[setting(value)], list(names.items())[:: math.ceil(len(names) * MIN_GAP)])
    bend = math.log if placed.axis["type"] == "log" else float
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
    rows: Mapping[int | None, Sequence[Any]],
    scales: Sequence[Scale],
) -> dict[str, Any]:
    """Return the lines of some points as one trace, a gap after each."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for point in points:
        row = rows[point.rank]
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
