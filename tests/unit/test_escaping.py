"""Text from rows, names and errors is text everywhere: in both pages, in what they draw, and on the terminal."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from lora_exp.errors import Problem, UserError, print_user_error
from lora_exp.reports import console as terminal
from lora_exp.reports.page import write_page
from lora_exp.reports.sweep_page import write_sweep
from lora_exp.secrets.masking import MaskingFormatter
from lora_exp.text import visible
from tests.sweeps import make_sweep, make_trial
from tests.unit.test_page import SAMPLES, make_folder

PAYLOADS = {
    "script": "<script>document.title='pwned'</script>",
    "script end": "</script><script>document.title='pwned'</script>",
    "image": "<img src=x onerror=\"document.title='pwned'\">",
    "attribute": '" onmouseover="document.title=\'pwned\'" x="',
    "attribute '": "' onfocus='document.title=1' autofocus='",
    "elements end": "</title></style></textarea></pre></svg></dd></td></main><h1>pwned</h1>",
    "comment": "<!--<script>",
    "entity": "&lt;script&gt;&#60;b&#62;",
    "template": "{{ 7 * 7 }}{% raw %}${7*7}",
    "address": "javascript:alert(1)//",
    "svg": "<svg/onload=alert(1)>",
    "plotly": "<a href='javascript:alert(1)'>x</a>%{x}",
}
HARMLESS = str.maketrans(dict.fromkeys("<>&\"'`{}%", "x"))

TERMINAL_CODES = ("\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\r", "\b\b\b", "\x1b[2J\x1b[H", "\x7f", "\x00")


class Structure(HTMLParser):
    """Every tag of a page with the names of its attributes, in order, and what stands in its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def run_page(folder: Path, text: str) -> str:
    """Return the page of a run in which everything that can be a text is this one."""
    lines = [{"step": step, "loss": 1.0 / (step + 1), text: 1.0, f"eval_{text}": 0.5} for step in range(3)]
    run = {
        **dict.fromkeys(("status", "error", "recipe", "started", "model", "objective_name"), text),
        "headline": {text: text, "loss": "loss"},
        "objective": 0.5,
        "choices": {text: text},
        "versions": {text: text},
        "device": {"name": text, "type": text, "threads": text},
        "git": {"commit": text, "dirty": True},
        "target_modules": [text],
        "reference": {"model": text, "computed": 1, "reused": 2},
        "wall_times": {text: 1.0},
    }
    make_folder(folder, run, lines, f"model: {text}\n")
    report = {text: {"rows": 3, "kept": 1, "dropped": {text: 2}, "source": text}}
    (folder / "data_report.json").write_text(json.dumps(report))
    sample = dict.fromkeys(SAMPLES[0], text)
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "metrics.json").write_text(json.dumps({text: 1.0}))
    return write_page(folder).read_text(encoding="utf-8")


def sweep_page(folder: Path, text: str) -> str:
    """Return the page of a sweep whose axes, values, models, errors and samples are this text."""
    facts = {"headline": {"loss": text}, "model": text, "choices": {"model": text, text: text}}
    for number in range(3):
        trial = make_trial(
            folder / str(number), {"data.name": f"{text}{number}", text: number}, 0.5 + number / 10, **facts
        )
        (trial / "samples.jsonl").write_text(json.dumps(dict.fromkeys(SAMPLES[0], text)) + "\n")
        write_page(trial)
    make_trial(folder / "3", {"data.name": text, text: 9}, error=f"ValueError: {text}", **facts)
    question = {"axes": ["data.name"], "varied": ["data.name", text], "common": {}, "commands": [[text]], "trials": 4}
    (folder / "sweep.json").write_text(json.dumps(question))
    write_sweep(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [run_page, sweep_page])
@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_a_page_with_hostile_text_has_the_tags_of_one_with_harmless_text(
    tmp_path: Path, page: Any, payload: str
) -> None:
    hostile = Structure(page(tmp_path / "hostile", payload))
    harmless = Structure(page(tmp_path / "harmless", payload.translate(HARMLESS)))
    assert hostile.tags == harmless.tags
    assert [each for each in hostile.scripts if "pwned" in each and not each.startswith("[")] == []


def test_the_data_of_the_charts_are_data(tmp_path: Path) -> None:
    payload = "".join(PAYLOADS.values())
    (figures,) = (each for each in Structure(sweep_page(tmp_path, payload)).scripts if each[:1] == "[")
    assert not re.search(r"[<>&']", figures), "not even to be read as HTML by a careless browser"
    texts = json.dumps(json.loads(figures), ensure_ascii=False)
    assert "&lt;script&gt;" in texts
    assert not re.search(r"<(?!br>)", texts), "Plotly reads a few tags in its labels"


def test_both_pages_forbid_what_was_not_written_by_us(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweep", 1)
    write_sweep(tmp_path / "sweep")
    pages = [run_page(tmp_path / "run", "x"), (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")]
    for html in pages:
        policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
        assert policy is not None
        assert policy[1].startswith("default-src 'none'")
        assert "script-src 'unsafe-inline'" not in policy[1]
        assert html.index("Content-Security-Policy") < html.index("<title>"), "before the first text from outside"


# The terminal ----------------------------------------------------------------------------------------


@given(text=st.text())
def test_visible_text_has_no_control_character_and_loses_nothing_else(text: str) -> None:
    shown = visible(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    plain = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    assert plain == re.sub(r"\\x[0-9a-f]{2}", "", shown) or "\\x" in text


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the console writes, as to a terminal that knows colours."""
    written = io.StringIO()
    monkeypatch.setattr(terminal.console, "_file", written)  # `file` would be set to today's stdout again
    monkeypatch.setattr(terminal.console, "_force_terminal", True)
    return written


@pytest.mark.parametrize("code", TERMINAL_CODES)
def test_a_control_sequence_is_shown_and_not_obeyed(code: str, printed: io.StringIO) -> None:
    table = Table(title=f"t{code}")
    table.add_column(f"c{code}")
    table.add_row(Text(f"cell{code}"))
    table.add_row(f"cell{code}")
    terminal.say(f"n{code}", f"line{code}")
    terminal.note(f"line{code}")
    terminal.console.print(table)
    terminal.console.print(f"plain{code}")
    text = re.sub(r"\x1b\[[\d;]*m", "", printed.getvalue()) if "31m" not in code else printed.getvalue()
    assert code not in text.replace("\r\n", "\n")
    assert f"line{visible(code)}" in text


@pytest.mark.parametrize("markup", ["[red]x[/red]", "[/]", "[link=file:///etc/passwd]x[/link]", ":smiley:", "[bold"])
def test_markup_in_a_text_is_printed_as_it_stands(markup: str, printed: io.StringIO) -> None:
    table = Table(title=markup)
    table.add_column(f"head{markup}", no_wrap=True)
    table.add_row(f"cell{markup}")
    terminal.say("name", markup)
    terminal.console.print(table)
    assert all(each in printed.getvalue() for each in (f"head{markup}", f"cell{markup}"))
    assert printed.getvalue().count(markup) == 4


def test_an_error_is_printed_safely(capsys: pytest.CaptureFixture[str]) -> None:
    print_user_error(UserError("a\x1b[31m", [Problem("rows\x9b.jsonl:1", "b\x07 at https://me:hunter2@host", "c\x1b")]))
    err = capsys.readouterr().err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", err)
    assert "hunter2" not in err


def test_a_log_record_is_written_safely() -> None:
    formatter = MaskingFormatter("%(message)s")
    try:
        raise ValueError("token hf_abcdefghijklmnopqrstuvwx\x1b[2J")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "at %s", ("https://me:hunter2@host",), sys.exc_info())
    line = formatter.format(record)
    assert "ValueError" in line
    assert not re.search(r"hunter2|hf_abc|\x1b", line)
