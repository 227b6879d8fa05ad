"""The page of a sweep, or of any runs to compare: `report.html`, one file that needs nothing else.

Plotly draws the charts in the reader's browser; its script stands in the page, and the page's Content-Security-Policy
lets run that script and our own few lines by their hashes, and nothing else: no other script, no network.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lora_exp.errors import count
from lora_exp.reports.figures.base import MOST_VALUES, Figure, label, setting, short_names, with_interval
from lora_exp.reports.figures.cost import cost_figures
from lora_exp.reports.figures.curves import curve_figures
from lora_exp.reports.figures.frontier import frontier_figure
from lora_exp.reports.figures.parallel import parallel_figure
from lora_exp.reports.figures.settings import objective_figures, order
from lora_exp.reports.page import PAGE, REMOTE_CODE, TEMPLATES, duration, memory, render
from lora_exp.run_folder import write_whole
from lora_exp.sweeps.leaderboard import Leaderboard, Point, leaderboard, summary, write_leaderboard
from lora_exp.sweeps.trials import Trial, read_trials, sweep_command

MOST_ROWS = 50
"""Rows of a table in the page; `leaderboard.csv` has all."""
SCALE_FREE = {
    "eval_rewards/accuracies": "reward accuracy",
    "eval_kl/chosen": "KL per token",
    "eval_logp_shift/chosen": "shift, chosen",
    "eval_logp_shift/rejected": "shift, rejected",
    "completions/mean_length": "answer tokens",
}
"""What DPO runs of different beta are compared by: loss, rewards and margins are multiples of beta."""
SAMPLE_COLUMNS = 3
"""Points whose answers stand side by side."""


def write_sweep(folder: Path, objective: str | None = None) -> Leaderboard:
    """Write `leaderboard.csv`, `leaderboard.json` and `report.html` of a sweep folder, as it stands now.

    Raises:
        UserError: If the folder holds no run.
    """
    trials = read_trials(folder, objective)
    board = write_leaderboard(folder, trials)
    write_sweep_page(folder / PAGE, board, folder.name or str(folder))
    return board


def write_comparison(page: Path, folders: Sequence[Path], objective: str | None = None) -> Leaderboard:
    """Write one page of any run folders and sweep folders.

    Raises:
        UserError: If a folder holds no run.
    """
    board = leaderboard(read_trials(folders, objective))
    write_sweep_page(page, board, "comparison")
    return board


def write_sweep_page(page: Path, board: Leaderboard, name: str) -> None:
    """Write the page of a leaderboard."""
    write_whole(page, render("sweep.html.j2", sweep_facts(board, name, page.parent)))


def sweep_facts(board: Leaderboard, name: str, beside: Path) -> dict[str, Any]:
    """Return what the template shows.

    Args:
        board: The trials, ranked.
        name: What the page is called.
        beside: The folder that the page will stand in.
    """
    frontier = frontier_figure(board)
    sections = [(title, charts) for title, charts in _sections(board, frontier) if charts]
    drawn = [figure for _, charts in sections for figure in charts]
    scripts = _scripts() if drawn else []
    failed = [trial for trial in board.trials if trial.status == "failed"]
    return {
        "name": name,
        "summary": summary(board),
        "running": any(trial.status == "running" for trial in board.trials),
        "asked": asked(board),
        "command": sweep_command(beside),
        "board": board,
        "best": _best(board, beside),
        "columns": list(short_names(board.axes).values()),
        "rows": [_row(point, board, beside) for point in board.points[:MOST_ROWS]],
        "left_out": max(0, len(board.points) - MOST_ROWS),
        "scale_free": scale_free(board),
        "sections": sections,
        "figures": [{"data": figure.data, "layout": figure.layout} for figure in drawn],
        "missing": frontier if isinstance(frontier, str) else "",
        "failed": [(trial, _settings(trial.axes), _link(trial, beside)) for trial in failed[:MOST_ROWS]],
        "failed_left_out": max(0, len(failed) - MOST_ROWS),
        "samples": samples(board),
        "totals": totals(board.trials),
        "scripts": scripts,
        "script_hashes": " ".join(f"'{_sha256(script)}'" for script in scripts),
    }


def _sections(board: Leaderboard, frontier: Figure | str | None) -> Iterable[tuple[str, list[Figure]]]:
    parallel = parallel_figure(board)
    yield "By setting", objective_figures(board)
    yield "Together", [parallel] if parallel else []
    yield "Reward against distance", [frontier] if isinstance(frontier, Figure) else []
    yield "Training", curve_figures(board)
    yield "Time and memory", cost_figures(board)


# Scripts ---------------------------------------------------------------------------------------------


def _scripts() -> list[Any]:
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    texts = [get_plotlyjs(), (TEMPLATES / "charts.js").read_text(encoding="utf-8")]
    return [Markup(text) for text in texts]  # noqa: S704 - the library's text and ours, no data


def _sha256(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


# Words and tables ------------------------------------------------------------------------------------


def asked(board: Leaderboard) -> list[tuple[str, str]]:
    """Return what the sweep was to find out: the settings that were tried, and what all runs share."""
    trials = [trial for trial in board.trials if trial.config]
    seeds = sorted({trial.seed for trial in trials if trial.seed is not None})
    facts = [(key, _tried([trial.axes[key] for trial in trials])) for key in board.axes]
    if len(seeds) > 1:
        facts.append(("seeds", ", ".join(map(str, seeds))))
    if board.objective_name:
        better = "less is better" if board.direction == "minimize" else "more is better"
        facts.append(("objective", f"{board.objective_name}: {better}"))
    for group in dict.fromkeys(group for trial in trials for group in trial.run.get("choices") or {}):
        options = _values((trial.run.get("choices") or {}).get(group) for trial in trials)
        if len(options) == 1 and group != "tracker" and options != [setting(None)]:
            facts.append((group, options[0]))
    if any(trial.run.get("trust_remote_code") for trial in trials):
        facts.append(("code", REMOTE_CODE))
    models = _values(trial.run.get("model") for trial in trials if trial.run.get("model"))
    return [*facts, ("weights", models[0])] if len(models) == 1 else facts


def _values(values: Iterable[Any]) -> list[str]:
    return [setting(value) for value in sorted({setting(v): v for v in values}.values(), key=order)]


def _tried(values: Sequence[Any]) -> str:
    """Return the values of a setting, or of very many the ends."""
    found = _values(values)
    if len(found) <= MOST_VALUES:
        return ", ".join(found)
    return f"{found[0]} to {found[-1]} ({len(found):,} values)"


@dataclass(frozen=True)
class Best:
    """The best point and the run of it to use.

    Args:
        point: It.
        trial: Its run with the best objective.
        settings: What was tried in it.
        objective: The mean with its interval.
        adapter: Where its adapter lies; empty where it was not kept.
        link: The run's own page; empty where there is none.
        config: The text of its `config.yaml`.
    """

    point: Point
    trial: Trial
    settings: str
    objective: str
    adapter: str
    link: str
    config: str


def _best(board: Leaderboard, beside: Path) -> Best | None:
    point = board.best
    if point is None or point.objective is None:
        return None
    trial, config = point.best, point.best.folder / "config.yaml"
    adapter = trial.folder / "adapter"
    return Best(
        point,
        trial,
        _settings(point.axes) or trial.name,
        with_interval(point.objective),
        str(adapter) if adapter.is_dir() else "",
        _link(trial, beside),
        config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def _settings(axes: Mapping[str, Any]) -> str:
    return "\n".join(f"{key}={setting(value)}" for key, value in axes.items())


def _row(point: Point, board: Leaderboard, beside: Path) -> dict[str, Any]:
    """Return a row of the leaderboard."""
    return {
        "rank": str(point.rank or ""),
        "settings": [setting(point.axes[key]) if key in point.axes else "" for key in board.axes],
        "objective": with_interval(point.objective) if point.objective else "",
        "status": point.status,
        "time": duration(point.seconds) if point.seconds else "",
        "memory": memory(point.peak_memory_bytes) if point.peak_memory_bytes else "",
        "links": [(_short_name(trial), _link(trial, beside)) for trial in point.trials],
    }


def scale_free(board: Leaderboard) -> dict[str, Any]:
    """Return the table of what does not scale with beta; nothing where no run logged a KL."""
    points = [point for point in board.points if point.objective][:MOST_ROWS]
    names = [name for name in SCALE_FREE if any(point.metric(name) for point in points)]
    if "eval_kl/chosen" not in names:
        return {}
    values = [[point.metric(name) for name in names] for point in points]
    return {
        "columns": [*short_names(board.axes).values(), *(SCALE_FREE[name] for name in names)],
        "rows": [
            [str(point.rank), *(setting(point.axes[key]) if key in point.axes else "" for key in board.axes)]
            + [with_interval(value) if value else "" for value in of_point]
            for point, of_point in zip(points, values, strict=True)
        ],
    }


def _short_name(trial: Trial) -> str:
    """Return what tells a run from its neighbours in its row: of a run that is named for its settings, the seed."""
    return f"seed {trial.seed}" if "=" in trial.name and trial.seed is not None else trial.name


def _link(trial: Trial, beside: Path) -> str:
    """Return the way from the page to a run's own page; empty where it has none."""
    page = trial.folder / PAGE
    # With the dot, as a folder named `a:b` would be read as a protocol.
    return f"./{quote(Path(os.path.relpath(page, beside)).as_posix())}" if page.is_file() else ""


def samples(board: Leaderboard) -> list[dict[str, Any]]:
    """Return each prompt of the best run with the answers of the best points, side by side."""
    points = [point for point in board.points if point.objective][:SAMPLE_COLUMNS]
    if not points:
        return []
    answers = [{sample.get("prompt"): sample.get("after") for sample in point.best.samples} for point in points]
    shown = []
    for sample in points[0].best.samples:
        columns = [("expected", sample.get("expected"), ""), ("before", sample.get("before"), "")]
        columns += [(label(p), a.get(sample.get("prompt")), "") for p, a in zip(points, answers, strict=True)]
        shown.append({"prompt": sample.get("prompt", ""), "columns": columns})
    return shown


def totals(trials: Sequence[Trial]) -> list[tuple[str, str]]:
    """Return what all trials took together."""
    peaks = [trial.peak_memory_bytes for trial in trials if trial.peak_memory_bytes]
    facts = [("time of all runs", duration(sum(trial.seconds for trial in trials)))]
    reused = [trial.run.get("reference") or {} for trial in trials]
    if any(reference.get("computed") or reference.get("reused") for reference in reused):
        computed, read = (sum(reference.get(name) or 0 for reference in reused) for name in ("computed", "reused"))
        facts.append(("reference", f"{count(computed, 'row')} computed, {read:,} reused"))
    return [*facts, ("largest peak memory", memory(max(peaks)))] if peaks else facts
