"""The page of a sweep: whole, self-contained, escaped, in the leaderboard's order."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from lora_exp.errors import UserError
from lora_exp.report import show_result
from lora_exp.reports.figures.base import Figure, label, plain
from lora_exp.reports.figures.frontier import frontier_figure
from lora_exp.reports.figures.parallel import MIN_GAP, parallel_figure
from lora_exp.reports.page import write_page
from lora_exp.reports.sweep_page import sweep_facts, write_comparison, write_sweep
from lora_exp.sweeps.leaderboard import leaderboard
from lora_exp.sweeps.trials import read_trials
from tests.sweeps import make_sweep, make_trial

SCRIPT = "<script>alert(1)</script>"
VOID = {"meta", "link", "wbr"}


class Page(HTMLParser):
    """What a page holds: its tags, links, scripts and the rows of its leaderboard."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.data = ""
        self.policy = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self.policy += (given.get("content") or "") if given.get("http-equiv") == "Content-Security-Policy" else ""
        if tag not in VOID:
            self.open.append(tag)
        self.is_data = given.get("type") == "application/json"
        assert not [name for name in given if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self.is_data:
                self.data += data
            else:
                self.scripts.append(data)
        elif self.open and self.open[-1] == "style":
            self.styles.append(data)


def page_of(folder: Path) -> tuple[str, Page]:
    write_sweep(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    assert html.endswith("</html>\n")
    return html, page


def own(html: str) -> str:
    """Return a page without the library's script."""
    return re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


def text_of(html: str) -> str:
    body = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def board_of(folder: Path) -> Any:
    return leaderboard(read_trials(folder))


def test_runs_that_lost_a_file_are_listed_and_end_no_page(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep")
    (sweep / "0" / "config.yaml").write_text("")
    (sweep / "1" / "run.json").write_text('{"status": "finis')
    (sweep / "2" / "metrics.json").unlink()
    with (sweep / "3" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "lo')
    (sweep / "4" / "run.json").unlink()
    (sweep / "5" / "config.yaml").unlink()
    moved = sweep.rename(tmp_path / "moved")
    board = write_sweep(moved)
    assert len(board.trials) == 21
    write_comparison(tmp_path / "page.html", [moved, make_trial(tmp_path / "alone", {"recipe.beta": 9.0}, 0.5)])
    assert "recipe.beta" in text_of((tmp_path / "page.html").read_text())
    with pytest.raises(UserError, match=r"run\.json: is torn"):
        show_result(moved / "1")


def test_the_page_answers_what_was_asked(tmp_path: Path) -> None:
    html, _ = page_of(make_sweep(tmp_path))
    text = text_of(html)
    for shown in (
        "21 trials: 18 finished, 1 running, 1 pruned, 1 failed",
        "recipe.beta 0.05, 0.1, 0.5, 1, 2, 3",
        "seeds 1, 2, 3",
        "eval_rewards/accuracies: more is better",
        "mean and 95 % interval of 3 seeds",
        "The best two are told apart at 95 %",
        f"adapter {tmp_path}/17/adapter",
        "python -m lora_exp recipe.beta=0.5 lora.r=16 seed=3",
        "OutOfMemoryError: tried to allocate 2 GiB",
        "Where is my parcel?",
        "peak memory 1.0 GiB",
    ):
        assert shown in text
    for title in (
        "by recipe.beta",
        "by lora.r",
        "All settings at once",
        "Reward against",
        "loss over the steps",
        "Time",
    ):
        assert re.search(f"<b>[^<]*{title}", html)


def test_runs_of_other_beta_are_compared_by_what_does_not_scale_with_it(tmp_path: Path) -> None:
    for name, beta, kl, shift in (("0", 0.1, 0.25, -4.5), ("1", 0.5, 0.125, -2.5)):
        trial = make_trial(tmp_path / name, {"recipe.beta": beta}, 0.5 + beta)
        final = json.loads((trial / "metrics.json").read_text())
        final |= {"eval_kl/chosen": kl, "eval_logp_shift/chosen": shift, "completions/mean_length": 40 * beta}
        (trial / "metrics.json").write_text(json.dumps(final))
    html, _ = page_of(tmp_path)
    section = html[html.index("What does not scale with beta") : html.index("By setting")]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in section.split("<tr")[2:]]
    assert rows == [["1", "0.5", "1", "0.125", "-2.5", "20"], ["2", "0.1", "0.6", "0.25", "-4.5", "4"]]
    assert "shift, rejected" not in section, "no run logged it"


def test_page_csv_and_json_have_one_order(tmp_path: Path) -> None:
    html, _ = page_of(make_sweep(tmp_path))
    table = html[html.index('<table class="board">') : html.index("</table>")]
    cells = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr")[2:]]
    shown = [(rank, float(r), float(beta)) for rank, r, beta, *_ in cells]
    with io.StringIO((tmp_path / "leaderboard.csv").read_text()) as file:
        rows = list(csv.DictReader(file))
    points = json.loads((tmp_path / "leaderboard.json").read_text())["points"]
    assert shown == [(row["rank"], float(row["lora.r"]), float(row["recipe.beta"])) for row in rows]
    assert shown == [(str(p["rank"] or ""), p["axes"]["lora.r"], p["axes"]["recipe.beta"]) for p in points]


def test_only_the_scripts_with_a_hash_run_and_nothing_is_loaded(tmp_path: Path) -> None:
    for name in ("0", "1"):
        write_page(make_trial(tmp_path / name, {"lora.r": name}, 0.5))
    html, page = page_of(tmp_path)
    policy = dict(part.strip().partition(" ")[::2] for part in page.policy.split(";"))
    assert policy["default-src"] == "'none'"
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert policy["script-src"].split() == [f"'sha256-{value}'" for value in hashes]
    assert len(page.scripts) == 2
    assert "connect-src" not in policy
    assert set(page.links) == {"data:,", "./0/report.html", "./1/report.html"}
    assert "://" not in own(html)
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not re.search(r"url\(|@import|@font-face", "".join(page.styles))


def test_data_is_escaped_wherever_it_stands(tmp_path: Path) -> None:
    evil = {"headline": {"loss": SCRIPT}, "model": SCRIPT, "choices": {"model": SCRIPT}, "wall_times": {SCRIPT: 1.0}}
    for number, value in enumerate((SCRIPT, "</script>" + SCRIPT, "b")):
        folder = make_trial(tmp_path / str(number), {"data.name": value, "lora.r": number}, 0.5 + number / 10, **evil)
        sample = {"prompt": SCRIPT, "expected": SCRIPT, "before": SCRIPT, "after": SCRIPT}
        (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    make_trial(tmp_path / "3", {"data.name": SCRIPT, "lora.r": 9}, error=f"ValueError: {SCRIPT}")
    (tmp_path / "3").rename(tmp_path / "<i>3")
    html, page = page_of(tmp_path)
    assert own(html).count("<script") == 1  # the figures
    assert "<i>" not in own(html)
    assert "alert" not in "".join(page.scripts[1:])
    assert html.count("&lt;script&gt;") > 15
    assert "ValueError: &lt;script&gt;" in html
    # What Plotly would read as markup of its own.
    texts = re.findall(r"<(?!br>)", json.dumps(json.loads(page.data)))
    assert not texts


def test_text_in_a_chart_is_text() -> None:
    assert plain("<b>&lt;") == "&lt;b&gt;&amp;lt;"


def figures_of(folder: Path) -> list[dict[str, Any]]:
    return list(sweep_facts(board_of(folder), "sweep", folder)["figures"])


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_figure_is_one_that_plotly_knows(tmp_path: Path, seeds: int) -> None:
    from plotly.graph_objects import Figure as PlotlyFigure

    make_sweep(tmp_path, seeds)
    make_trial(tmp_path / "a", {"recipe.beta": 0.05, "lora.r": 4, "lora.bias": "all"}, 0.4)
    figures = figures_of(tmp_path)
    assert len(figures) > 6
    for figure in figures:
        PlotlyFigure(figure)  # raises at a name or a value that it does not know
        assert figure["data"]
        for trace in figure["data"]:
            assert len(trace["x"]) == len(trace["y"]) > 0


def test_the_numbers_beside_a_column_of_the_parallel_coordinates_stand_apart(tmp_path: Path) -> None:
    for number, value in enumerate((0.5, 0.501, 0.502, 0.9)):
        settings = {"lora.r": 2**number, "data.name": f"n{number}", "recipe.beta": 0.1 * number}
        make_trial(tmp_path / str(number), settings, value)
    for number in range(60):
        make_trial(tmp_path / f"x{number}", {"lora.r": 1, "data.name": f"m{number}", "recipe.beta": 0.0}, 0.6)
    figure = parallel_figure(board_of(tmp_path))
    assert figure is not None
    columns: dict[int, list[float]] = {}
    for mark in figure.layout["annotations"]:
        columns.setdefault(mark["x"], []).append(mark["y"])
    assert len(columns) == 4
    for places in columns.values():
        assert len(places) > 1
        assert min(right - left for left, right in pairwise(sorted(places))) >= MIN_GAP


def test_intervals_are_drawn_where_there_are_seeds(tmp_path: Path) -> None:
    make_sweep(tmp_path / "three", 3)
    make_sweep(tmp_path / "one", 1)
    bars = {
        name: [trace["error_y"]["visible"] for trace in figures_of(tmp_path / name)[0]["data"]]
        for name in ("one", "three")
    }
    assert set(bars["one"]) == {False}
    assert set(bars["three"]) == {True}


def test_the_frontier_says_what_stands_in_for_kl_or_what_is_missing(tmp_path: Path) -> None:
    for number in range(3):
        make_trial(tmp_path / str(number), {"lora.r": number}, 0.5 + number / 10)
    shift = frontier_figure(board_of(tmp_path))
    assert isinstance(shift, Figure)
    assert "eval_kl/chosen" in shift.notes[0]
    for number in range(3):
        (tmp_path / str(number) / "metrics.jsonl").write_text("")
    missing = frontier_figure(board_of(tmp_path))
    assert isinstance(missing, str)
    assert "eval_kl/chosen" in missing
    html, _ = page_of(tmp_path)
    assert missing in text_of(html)


def test_the_frontier_holds_the_points_that_none_beats_in_both(tmp_path: Path) -> None:
    places = [(0.1, 0.6), (0.2, 0.5), (0.3, 0.8), (0.4, 0.7), (0.5, 0.9)]
    for number, (kl, accuracy) in enumerate(places):
        folder = make_trial(tmp_path / str(number), {"lora.r": number}, accuracy)
        (folder / "metrics.json").write_text(json.dumps({"eval_kl/chosen": kl, "eval_rewards/accuracies": accuracy}))
    figure = frontier_figure(board_of(tmp_path))
    assert isinstance(figure, Figure)
    line, dots = figure.data
    assert list(zip(line["x"], line["y"], strict=True)) == [places[0], places[2], places[4]]
    assert sorted(zip(dots["x"], dots["y"], strict=True)) == places
    assert not figure.notes


def test_without_rewards_there_is_no_frontier_and_no_word_of_it(tmp_path: Path) -> None:
    for number in range(2):
        folder = make_trial(tmp_path / str(number), {"lora.r": number}, objective_name="eval_loss")
        facts = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(facts | {"status": "finished", "objective": 0.5}))
        (folder / "metrics.json").write_text('{"eval_loss": 0.5}')
    assert frontier_figure(board_of(tmp_path)) is None
    html, _ = page_of(tmp_path)
    assert "Reward against" not in html


@pytest.mark.parametrize("status", ["running", "failed", "pruned"])
def test_a_sweep_without_a_result_has_a_page(tmp_path: Path, status: str) -> None:
    make_trial(tmp_path / "0", {}, status=status)
    html, _ = page_of(tmp_path)
    assert "No run has a result" in text_of(html)


def test_the_page_follows_the_sweep(tmp_path: Path) -> None:
    make_trial(tmp_path / "0", {"lora.r": 4}, 0.5)
    page_of(tmp_path)
    make_trial(tmp_path / "1", {"lora.r": 8}, 0.6)
    html, _ = page_of(tmp_path)
    assert "2 trials: 2 finished" in html
    assert {path.name for path in tmp_path.iterdir()} == {
        "0",
        "1",
        "leaderboard.csv",
        "leaderboard.json",
        "report.html",
    }


def test_links_lead_to_the_pages_of_the_runs(tmp_path: Path) -> None:
    runs = [make_trial(tmp_path / "a" / "b:c d?", {}, 0.5, seed=1), make_trial(tmp_path / "e", {}, 0.6, seed=2)]
    for run in runs:
        write_page(run)
    (tmp_path / "here").mkdir()
    write_comparison(tmp_path / "here" / "page.html", runs)
    links = Page((tmp_path / "here" / "page.html").read_text()).links
    found = {(tmp_path / "here" / unquote(link)).resolve() for link in links if link != "data:,"}
    assert found == {run / "report.html" for run in runs}
    assert all(link.startswith("./") for link in links if link != "data:,")


def test_a_label_is_short_until_two_keys_would_be_the_same(tmp_path: Path) -> None:
    make_trial(tmp_path / "0", {"trainer.learning_rate": 1e-5, "recipe.beta": 0.1}, 0.5)
    make_trial(tmp_path / "1", {"trainer.learning_rate": 2e-5, "recipe.beta": 0.2}, 0.6)
    assert label(board_of(tmp_path).points[0]) == "#1 beta=0.2, learning_rate=2e-05"
    make_trial(tmp_path / "2", {"trainer.learning_rate": 2e-5, "recipe.learning_rate": 1}, 0.7)
    assert "recipe.learning_rate=1" in label(board_of(tmp_path).points[0])


def report(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "lora_exp.report", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60)


def test_the_command_reports_a_sweep(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweep")
    done = report("sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines() if re.match(r"\s+([1-6]|-)\s", line)]
    assert [line[0] for line in table] == ["1", "2", "3", "4", "5", "6", "-", "-", "-"]
    assert {"failed", "pruned", "running"} <= {word for line in table[6:] for word in line}
    assert (tmp_path / "sweep" / "report.html").is_file()


def test_the_command_compares_a_sweep_and_a_run(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweep", seeds=1)
    make_trial(tmp_path / "run", {}, 0.5)
    done = report("sweep", "run", "--objective", "eval_loss", "--output", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "page.html" in done.stdout
    assert "10 trials" in (tmp_path / "page.html").read_text()
    assert "eval_loss: less is better" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "run",
    [
        {"recipe": "dpo", "status": "failed", "error": "ValueError: no", "wall_times": {}},
        {"status": "running", "wall_times": {"data": 0.5}},
    ],
)
def test_the_command_reports_a_run_that_did_not_finish(tmp_path: Path, run: dict[str, Any]) -> None:
    (tmp_path / "run.json").write_text(json.dumps(run))
    done = report(".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run["status"] in done.stdout
    assert run.get("error", "") in done.stdout
    assert (tmp_path / "report.html").is_file()


def test_the_command_reports_a_run_whose_loss_became_no_number(tmp_path: Path) -> None:
    folder = make_trial(tmp_path / "run", {}, 0.5)
    (folder / "metrics.json").write_text('{"train_loss": null, "eval_loss": null}')
    done = report("run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"eval loss +0.69 +no number", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere: is no folder"),
        (["."], "holds no run"),
        (["run", "nowhere"], "nowhere: is no folder"),
        (["run", "--output", "nowhere/page.html"], "there is no folder nowhere"),
    ],
)
def test_what_the_user_can_mend_is_no_traceback(tmp_path: Path, arguments: list[str], told: str) -> None:
    if "run" in arguments:
        make_trial(tmp_path / "run", {}, 0.5)
    done = report(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
