"""What limits would do follows from lengths alone, and is what they do; too great a loss stops the run."""

from __future__ import annotations

from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_exp.config import DataConfig
from lora_exp.data import tokenize
from lora_exp.data.lengths import RowLengths
from lora_exp.data.tokenize import Encoded, Limits, SplitReport
from lora_exp.errors import UserError
from lora_exp.preflight.lengths import (
    effect,
    histogram,
    other_limits,
    other_prompt_limits,
    shorten,
    sufficient,
    with_length,
)
from lora_exp.preflight.losses import require_rows_kept

ids = st.lists(st.integers(0, 1), max_size=12)
rows_of_one = st.lists(st.tuples(ids, ids), min_size=1, max_size=8)
rows_of_two = st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=8)


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    length = draw(st.integers(2, 20))
    prompt = draw(st.none() | st.integers(1, length - 1))
    return Limits(length, prompt, draw(st.sampled_from(["left", "right"])))


def cut(rows: list[tuple[list[int], ...]], asked: Limits) -> tuple[SplitReport, list[list[list[int]]]]:
    """Cut rows of token ids as the run does."""
    report = SplitReport("rows")
    whole = [Encoded(list(prompt), list(map(list, answers))) for prompt, *answers in rows]
    made = [tokenize._cut(each, asked, report) for each in whole]
    return report, [[each.prompt, *each.answers] for each in made if each is not None]


@given(rows_of_one | rows_of_two, limits(), limits())
def test_lengths_tell_what_any_limit_does(rows: Any, first: Limits, other: Limits) -> None:
    lengths = cut(rows, first)[0].lengths
    report, kept = cut(rows, other)
    found = effect(lengths, other)
    assert (found.rows, found.dropped) == (report.rows, report.rows - report.kept)
    assert found.cut_tokens == report.cut_prompt_tokens + report.cut_answer_tokens
    uncut = cut(rows, Limits(10**6, None, "left"))[0].lengths
    assert found.cut <= len(uncut)
    assert shorten(lengths, other).examples().tolist() == [[len(part) for part in row] for row in kept]


@given(rows_of_one, limits())
def test_a_row_that_loses_nothing_is_not_cut(rows: Any, asked: Limits) -> None:
    """Counted row by row: the report counts prompts and answers apart."""
    changed = 0
    for row in rows:
        report, kept = cut([row], asked)
        changed += bool(kept) and report.cut_prompts + report.cut_answers > 0
    assert effect(cut(rows, asked)[0].lengths, asked).cut == changed


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_a_histogram_holds_every_row_once(values: list[int]) -> None:
    bars = histogram(values)
    assert len(bars) <= 12
    assert sum(bar.rows for bar in bars) == len(values)
    for bar in bars:
        assert bar.rows == sum(bar.low <= value <= bar.high for value in values)
    assert all(before.high + 1 == after.low for before, after in pairwise(bars))


def many(prompt: int, answer: int, number: int = 10) -> RowLengths:
    lengths = RowLengths()
    for _ in range(number):
        lengths.add([0] * prompt, [[1] * answer])
    return lengths


@given(st.lists(st.lists(st.integers(0, 1), max_size=5), min_size=1, max_size=5), st.integers(0, 3))
def test_what_all_prompts_share_is_counted_and_kept(prompts: list[list[int]], shared: int) -> None:
    lengths = RowLengths()
    prompts = [[7] * shared + prompt for prompt in prompts]
    for prompt in prompts:
        lengths.add(prompt, [[1]])
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    assert lengths.common == len(list(columns))
    assert RowLengths(**lengths.as_dict()) == lengths


def test_other_limits_reach_the_longest_row_and_hold_the_present_one() -> None:
    lengths = many(200, 500)
    tried = other_limits(lengths, Limits(300, 150, "left"))
    assert [each.max_length for each in tried] == [128, 256, 300, 512, 1024]
    assert [each.max_prompt_length for each in tried] == [64, 128, 150, 256, 512]
    assert effect(lengths, tried[-1]).cut == 0
    prompts = other_prompt_limits(lengths, Limits(300, 150, "left"))
    assert [each.max_prompt_length for each in prompts] == [32, 64, 128, 150, 256]


def test_a_prompt_limit_of_its_own_stays_as_it_is() -> None:
    assert with_length(Limits(512, 100, "left"), 1024).max_prompt_length == 100
    assert with_length(Limits(512, 100, "left"), 64).max_prompt_length == 63
    assert with_length(Limits(512, 256, "left"), 1024).max_prompt_length == 512
    assert with_length(Limits(512, None, "left"), 64).max_prompt_length is None


@given(st.integers(1, 400), st.integers(1, 400), st.integers(2, 200))
def test_the_length_that_is_proposed_is_the_smallest_of_its_kind(prompt: int, answer: int, length: int) -> None:
    lengths, asked = many(prompt, answer), Limits(length, length // 2, "left")
    assume(effect(lengths, asked).cut > 0)
    found = sufficient(lengths, asked, lambda each: each.cut == 0)
    lower = [with_length(asked, 64 * n) for n in range(length // 64 + 1, 20)]
    enough = [each.max_length for each in lower if effect(lengths, each).cut == 0]
    assert found is not None
    assert found.limits.max_length == enough[0]


def lose(data: DataConfig, rows: list[tuple[list[int], ...]], asked: Limits) -> None:
    report = cut(rows, asked)[0]
    require_rows_kept(data, {"train": asked}, {"train": report})


def pair(shared: int) -> tuple[list[int], ...]:
    """Make a preference row whose answers part after so many tokens."""
    return [0] * 10, [1] * shared + [2], [1] * shared + [3]


def test_a_run_that_drops_too_many_rows_stops_with_the_length_that_keeps_them() -> None:
    rows = [pair(1)] * 9 + [pair(50)]
    asked = Limits(32, 16, "left")
    lose(DataConfig(max_dropped_share=0.1), rows, asked)
    lose(DataConfig(max_dropped_share=None), rows, asked)
    with pytest.raises(UserError) as caught:
        lose(DataConfig(), rows, asked)
    (problem,) = caught.value.problems
    assert "1 of 10 rows (10.0%) would be dropped: 1 answers equal after cutting" in problem.what
    assert "recipe.max_length=64 drops 0 of them" in problem.mend
    assert "data.max_dropped_share=0.1" in problem.mend


def test_rows_that_no_length_saves_are_to_be_mended() -> None:
    same = ([0] * 3, [1], [1])
    with pytest.raises(UserError) as caught:
        lose(DataConfig(), [same, pair(1)], Limits(32, 16, "left"))
    assert caught.value.problems[0].mend == "accept it with data.max_dropped_share=0.5, or mend the rows"


def test_cut_rows_stop_a_run_only_where_it_is_asked_for() -> None:
    rows = [([0] * 40, [1] * 40)] * 3 + [([0] * 4, [1] * 4)]
    asked = Limits(32, 16, "left")
    lose(DataConfig(), rows, asked)
    lose(DataConfig(max_cut_share=0.75), rows, asked)
    with pytest.raises(UserError) as caught:
        lose(DataConfig(max_cut_share=0.5), rows, asked)
    (problem,) = caught.value.problems
    assert "3 of 4 rows (75.0%) would be cut, by 144 tokens in all" in problem.what
    assert "recipe.max_length=128 cuts 0 of them" in problem.mend


def test_the_sample_loses_nothing_by_default(tmp_path: Path) -> None:
    from tests.runs import tokenized

    for recipe in ("sft", "dpo"):
        _, data, _ = _tokenized_tiny(tokenized, recipe, tmp_path)
        for report in data.reports.values():
            assert report.kept == report.rows


def _tokenized_tiny(tokenized: Any, recipe: str, folder: Path) -> Any:
    from omegaconf import OmegaConf

    from lora_exp.models.embedded import build
    from tests.runs import composed

    model = folder / recipe
    model.mkdir()
    embedded: Any = OmegaConf.to_container(composed(["model=tiny"]).model.embedded, resolve=True)
    build(embedded, model)
    out = folder / f"{recipe}-run"
    out.mkdir()
    overrides = ["model=custom", f"model.pretrained_model_name_or_path={model}", f"recipe={recipe}"]
    return tokenized([*overrides, f"output_dir={out}"])


def test_lengths_are_kept_compactly() -> None:
    lengths = many(3, 4, number=1000)
    assert len(lengths) == 1000
    assert lengths._numbers.itemsize * len(lengths._numbers) <= 12 * 1000
    assert np.array_equal(lengths.longest, np.full(1000, 7))
