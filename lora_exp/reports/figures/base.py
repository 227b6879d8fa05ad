"""What all charts of a sweep share: colours, the layout, and names that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_exp.reports.page import number
from lora_exp.sweeps.leaderboard import Interval, Point

COLOURS = ("#d9730d", "#2f7fc9", "#2e9e6b", "#9a6bc4", "#d1495b", "#1b94a4", "#a97142", "#b0589b")
"""The first is for the best."""
GREY = "#8b939c"

MOST_LINES = 8
"""Lines that colours still tell apart."""
MOST_POINTS = 500
"""Points of a chart; a sweep of thousands shows its best."""
MOST_VALUES = 20
"""Values of a setting that are worth a mean each."""


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
