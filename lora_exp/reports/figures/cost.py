"""Where the time went, and the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from lora_exp.reports.figures.base import COLOURS, GREY, Figure, axis_title, label, layout, plain
from lora_exp.reports.page import duration
from lora_exp.sweeps.leaderboard import Leaderboard, Point

MOST_BARS = 30


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
