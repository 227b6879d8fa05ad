"""Reward against the distance from the reference model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_exp.reports.figures.base import (
    COLOURS,
    GREY,
    MOST_LINES,
    MOST_POINTS,
    Figure,
    axis_title,
    label,
    layout,
    plain,
    with_interval,
)
from lora_exp.reports.page import series_of
from lora_exp.sweeps.leaderboard import Interval, Leaderboard, Point, interval

KL, ACCURACY, LOGPS = "eval_kl/chosen", "eval_rewards/accuracies", "eval_logps/chosen"


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
