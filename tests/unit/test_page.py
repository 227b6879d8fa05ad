"""The page of a run: whole, self-contained, escaped, and there whatever is missing from the folder."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.errors import UserError
from lora_exp.reports.page import (
    AREA,
    draw,
    duration,
    number,
    round_ticks,
    tick_label,
    write_page,
)

SCRIPT = "<script>alert(1)</script>"
VOID = {"meta", "link"}

RUN = {
    "status": "finished",
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "objective_name": "eval_rewards/accuracies",
    "objective": 0.8125,
    "error": None,
    "started": "2026-11-22T17:37:23+00:00",
    "recipe": "dpo",
    "headline": {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "margin"},
    "choices": {
        "recipe": "dpo",
        "model": "smollm2_135m",
        "quant": "8bit",
        "lora": "dora",
        "trainer": "gpu_bf16",
        "experiment": None,
    },
    "versions": {
        "python": "3.11.7",
        "lora_exp": "0.1.0",
        "torch": "2.13.0+cpu",
        "trl": "1.16.0",
        "peft": "0.21.2",
    },
    "git": {"commit": "f00dfeed" * 5, "dirty": True},
    "device": {"type": "cpu", "name": "AMD EPYC", "threads": 2},
    "trainable_parameters": 4884480,
    "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "reference": {"model": "adapter off", "computed": 270, "reused": 0},
    "peak_memory_bytes": 3 * 2**30,
    "wall_times": {"data": 0.63, "model": 5.11, "evaluate": 21.3, "train": 402.4, "save": 0.02},
}
CONFIG = """recipe:
  _target_: lora_exp.recipes.dpo.DPO
  beta: 0.1
  objective: eval_rewards/accuracies
model:
  pretrained_model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
objective: null
"""
LENGTHS = {"min": 45, "median": 104.5, "max": 1154}
SPLIT = {
    "source": "a/rather/long/path/to/the/data/train.dpo.jsonl",
    "rows": 1240,
    "kept": 1231,
    "dropped": {"prompt longer than recipe.max_prompt_length": 7, "empty answer": 2},
    "cut_prompts": 12,
    "cut_prompt_tokens": 1340,
    "cut_answers": 0,
    "cut_answer_tokens": 0,
    "prompt_lengths": LENGTHS,
    "answer_lengths": LENGTHS,
}
SAMPLES = [
    {
        "prompt": "user\nThe two-step page asks me for a security key. I lost mine on holiday.\nassistant\n",
        "expected": "Sign in with a backup code.\n\n1. Open the page\n2. Choose *another way*",
        "before": "\x00\f��� IIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIII",
        "after": "Use the spare key at home, or a backup code.",
    },
    {
        "prompt": f"user\n{SCRIPT}\nassistant\n",
        "expected": "No.",
        "before": "ja\u2028nein",
        "after": "ja\u2028nein",
    },
]


def training_lines(steps: int = 300) -> list[dict[str, Any]]:
    """Return what a DPO run logs: training every 5 steps, evaluation before the first and then every 60."""
    lines: list[dict[str, Any]] = []
    for step in range(0, steps + 1, 5):
        loss = 0.35 + 0.34 * math.exp(-step / 90) + 0.04 * math.sin(step * 1.7)
        values = {"loss": loss, "rewards/accuracies": 1.15 - loss, "rewards/margins": 3 * (0.72 - loss)}
        if step:
            lines.append({"step": step, "epoch": step / 100, "grad_norm": 1.0, "learning_rate": 5e-5, **values})
        if step % 60 == 0:
            lines.append({"step": step, **{f"eval_{key}": value * 1.03 for key, value in values.items()}})
    return [*lines, {"step": steps, "train_runtime": 400.1, "train_loss": 0.44}]


def make_folder(
    folder: Path, run: dict[str, Any] = RUN, steps: list[dict[str, Any]] | None = None, config: str = CONFIG
) -> Path:
    lines = training_lines() if steps is None else steps
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    final = [line for line in lines if "eval_loss" in line][-1:]
    (folder / "metrics.json").write_text(json.dumps({k: v for line in final for k, v in line.items() if k != "step"}))
    splits = {"train": SPLIT, "val": {**SPLIT, "dropped": {}, "prompt_lengths": None}}
    (folder / "data_report.json").write_text(json.dumps(splits))
    (folder / "samples.jsonl").write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in SAMPLES))
    (folder / "config.yaml").write_text(config)
    return folder


class Page(HTMLParser):
    """The tags of a page: whether each closes the one it should, and what the page would load or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(folder: Path) -> str:
    path = write_page(folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    assert not Page(html).open
    assert html.endswith("</html>\n")
    return html


@pytest.fixture
def html(tmp_path: Path) -> str:
    return page_of(make_folder(tmp_path))


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_the_page_shows_the_run(html: str) -> None:
    text = text_of(html)
    for shown in (
        "dpo · HuggingFaceTB/SmolLM2-135M-Instruct finished",
        "started 2026-11-22 17:37 UTC",
        "objective 0.8125 eval_rewards/accuracies",
        "eval loss 0.7107 → 0.409",
        "time 7 min 09 s",
        "peak memory 3.0 GiB",
        "trainable parameters 4,884,480",
        "7 prompt longer than recipe.max_prompt_length",
        "12 (1,340 tokens)",
        "45 / 104.5 / 1,154",
        "adapter off: 270 rows computed, 0 reused",
        "torch 2.13.0+cpu",
        "beta: 0.1",
    ):
        assert shown in text
    assert "experiment" not in text, "none was chosen"


def test_each_headline_metric_has_one_chart_of_both_series(html: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
    assert [re.search("<b>(.*?)</b>", figure)[1] for figure in figures] == list(RUN["headline"].values())
    for figure in figures:
        drawing = figure[figure.index("</figcaption>") :]
        assert drawing.count("<polyline") == 2
        assert drawing.count("<circle") == drawing.count("<title>eval, step ") == 6


def test_nothing_is_loaded_or_run(html: str) -> None:
    page = Page(html)
    assert set(page.links) == {"data:,"}
    assert not {"script", "img", "iframe", "object", "embed"} & set(page.seen)
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import|@font-face|://", style)


def test_data_is_escaped_wherever_it_stands(tmp_path: Path) -> None:
    lines = [*training_lines(), {"step": 300, SCRIPT: 1.0, f"eval_{SCRIPT}": 0.5}]
    run = {
        **dict.fromkeys(("status", "error", "recipe", "started"), SCRIPT),
        "headline": {SCRIPT: SCRIPT},
        "objective": 0.5,
        "choices": {SCRIPT: SCRIPT},
        "versions": {SCRIPT: SCRIPT},
        "device": {"name": SCRIPT, "type": '"><i onclick="x'},
        "wall_times": {SCRIPT: 1.0},
    }
    config = f"  pretrained_model_name_or_path: {SCRIPT}\n  objective: {SCRIPT}\n</pre>{SCRIPT}\n"
    html = page_of(make_folder(tmp_path, run, lines, config))
    assert "<script" not in html
    assert "<i " not in html
    assert html.count("&lt;script&gt;") > 15


def test_line_breaks_stay_and_control_characters_show(html: str) -> None:
    assert "Sign in with a backup code.\n\n1. Open the page\n2. Choose" in html
    assert r"\x00\x0c" in html
    assert "ja\u2028nein" in html
    assert "the same as before" in html


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "metrics.json", "data_report.json", "samples.jsonl", "config.yaml"]
)
def test_a_missing_file_leaves_its_part_out(tmp_path: Path, missing: str) -> None:
    folder = make_folder(tmp_path)
    (folder / missing).unlink()
    assert "smollm2_135m" in page_of(folder)


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"status": "running", "objective": None, "error": None, "git": None, "wall_times": {}},
        {
            "status": "failed",
            "error": "OutOfMemoryError: tried to allocate\n2 GiB",
            "device": {"type": "cuda"},
        },
        {"reference": {"model": None, "computed": 0, "reused": 0}, "started": "yesterday", "headline": {}},
    ],
)
def test_run_json_alone_is_enough(tmp_path: Path, run: dict[str, Any]) -> None:
    (tmp_path / "run.json").write_text(json.dumps(run))
    html = page_of(tmp_path)
    assert run.get("status", "unknown") in text_of(html)
    assert (run.get("error") or "") in html
    assert "<svg" not in html


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_page(tmp_path)
    assert not list(tmp_path.iterdir())


def test_values_that_are_no_number_are_gaps(tmp_path: Path) -> None:
    values = [0.7, 0.6, None, 0.5, float("nan"), 0.4, 0.3, float("inf")]
    lines = [{"step": step, "loss": value} for step, value in enumerate(values)]
    html = page_of(make_folder(tmp_path, steps=lines))
    drawing = html[html.index("</figcaption>") :]
    assert drawing.count("<polyline") == 2
    assert drawing.count("<title>train, step 3: 0.5</title>") == drawing.count("<circle") == 1
    assert "3 logged values were no number" in html
    assert "train loss no number" in text_of(html)


def test_a_metric_that_never_was_a_number_is_named_and_not_drawn(tmp_path: Path) -> None:
    html = page_of(make_folder(tmp_path, steps=[{"step": 1, "loss": None, "eval_loss": None}]))
    assert "2 logged values were no number (NaN or infinite)." in html
    assert "<svg" not in html


def test_the_best_checkpoint_evaluated_again_does_not_move_the_last_point(tmp_path: Path) -> None:
    lines = [{"step": 1, "eval_loss": 0.5}, {"step": 2, "eval_loss": 0.9}, {"step": 2, "eval_loss": 0.5}]
    html = page_of(make_folder(tmp_path, steps=lines))
    assert "eval, step 2: 0.9" in html
    assert "eval loss 0.5" in text_of(html)


def test_without_evaluation_the_last_training_value_stands_at_the_top(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}, {"step": 2, "train_runtime": 1.0}]
    assert "train loss 0.25 time" in text_of(page_of(make_folder(tmp_path, steps=lines)))


def test_a_second_page_takes_the_place_of_the_first(tmp_path: Path) -> None:
    page_of(make_folder(tmp_path))
    html = page_of(make_folder(tmp_path, {**RUN, "status": "pruned"}))
    assert ">pruned<" in html
    assert [path.name for path in tmp_path.glob("*report.html*")] == ["report.html"]


finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e99, max_value=1e99)
points = st.dictionaries(st.integers(0, 10**7), st.none() | finite, max_size=30).map(lambda d: sorted(d.items()))


@given(train=points, evaluation=points)
def test_points_go_rightwards_inside_the_plot_area(train: Any, evaluation: Any) -> None:
    series = {"train": train, "eval": evaluation}
    chart = draw("loss", series)
    for line in chart.lines:
        drawn = [tuple(map(float, pair.split(","))) for stroke in line.strokes for pair in stroke.split()]
        drawn_x = [x for x, _ in drawn]
        dots_x = [dot.x for dot in line.dots]
        assert drawn_x == sorted(drawn_x)
        assert dots_x == sorted(dots_x)
        for x, y in [*drawn, *((dot.x, dot.y) for dot in line.dots)]:
            assert AREA.left <= x <= AREA.right
            assert AREA.top <= y <= AREA.bottom
        assert bool(drawn_x or dots_x) == any(value is not None for _, value in series[line.name])
    for tick in [*chart.x_ticks, *chart.y_ticks]:
        assert AREA.left <= tick.x <= AREA.right
        assert AREA.top <= tick.y <= AREA.bottom
    assert chart.gaps == sum(value is None for _, value in [*train, *evaluation])


@given(st.tuples(finite, finite).map(sorted))
def test_ticks_hold_the_values_and_are_few(bounds: list[float]) -> None:
    ticks = round_ticks(*bounds)
    slack = 1e-9 * max(map(abs, ticks))
    assert ticks[0] <= bounds[0] + slack
    assert ticks[-1] >= bounds[1] - slack
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.31, 0.72, ["0.3", "0.4", "0.5", "0.6", "0.7", "0.8"]),
        (0, 300, ["0", "100", "200", "300"]),
        (-1108, -607, ["-1,200", "-1,000", "-800", "-600"]),
        (0.69312, 0.6932, ["0.69312", "0.69314", "0.69316", "0.69318", "0.69320"]),
        (0, 2e6, ["0", "5e+05", "1e+06", "1.5e+06", "2e+06"]),
    ],
)
def test_tick_labels_are_round_and_tell_apart(low: float, high: float, labels: list[str]) -> None:
    ticks = round_ticks(low, high)
    assert [tick_label(tick, ticks[1] - ticks[0]) for tick in ticks] == labels


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.02, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (3599.7, "1 h 00 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (20286.0, "20,286"), (3, "3"), (None, "no number"), (1e20, "1e+20")],
)
def test_number(value: Any, text: str) -> None:
    assert number(value) == text
