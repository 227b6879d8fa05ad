"""Packing loses nothing: from a flat row every row of the padded batch can be read again, scores and all."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.data.kinds import IGNORED
from lora_exp.engine.packing import Family, Row, families, fill, pack

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12)
"""Few different ones, so that rows often start alike."""


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Row], int]:
    """Draw rows as a collator stacks them, and how many make an example."""
    per_example = draw(st.integers(1, 2))
    examples = draw(st.integers(1, 4))
    prompts = [draw(st.lists(st.integers(0, 3), max_size=6)) for _ in range(examples)]
    rows = []
    for index in range(per_example * examples):
        prompt, answer = prompts[index % examples], draw(TOKENS)
        labels = [IGNORED] * len(prompt) + answer
        rows.append(Row(index, np.array(prompt + answer), np.array(labels)))
    return rows, per_example


def read_back(members: list[Family]) -> dict[int, list[tuple[int, int]]]:
    """Return each row's (token, position) pairs from the flat row, by the layout that `Family` documents."""
    packed, start = pack(members), 0
    flat = list(zip(packed.ids.tolist(), packed.positions.tolist(), strict=True))
    rows = {}
    for family in members:
        prefix, branch = flat[start : start + family.prefix], start + family.prefix
        for row, size in zip(family.rows, family.branches, strict=True):
            rows[row.index] = prefix + flat[branch : branch + size]
            branch += size
        start = branch
    assert start == len(flat)
    return rows


@given(batches())
def test_every_row_is_there_with_its_positions(batch: tuple[list[Row], int]) -> None:
    rows, per_example = batch
    found = read_back(families(rows, per_example))
    assert found == {row.index: [(token, place) for place, token in enumerate(row.ids.tolist())] for row in rows}


@given(batches())
def test_the_prefix_is_all_that_an_examples_rows_share(batch: tuple[list[Row], int]) -> None:
    rows, per_example = batch
    for family in families(rows, per_example):
        ids = [row.ids.tolist() for row in family.rows]
        assert all(row[: family.prefix] == ids[0][: family.prefix] for row in ids)
        following = {tuple(row[family.prefix : family.prefix + 1]) for row in ids}
        assert len(ids) == 1 or len(following) > 1 or () in following


@given(batches())
def test_each_scored_token_has_its_place_and_the_position_before_it(batch: tuple[list[Row], int]) -> None:
    rows, per_example = batch
    members = families(rows, per_example)
    packed = pack(members)
    expected = {
        (row.index, column): token
        for row in rows
        for column, token in enumerate(row.labels[1:].tolist())
        if token != IGNORED
    }
    places = zip(packed.rows.tolist(), packed.columns.tolist(), packed.sources.tolist(), strict=True)
    found = {}
    for row, column, source in places:
        position = packed.scored[source]
        assert packed.positions[position] == column
        assert packed.ids[position] == rows[row].ids[column]
        found[row, column] = int(packed.targets[source])
    assert found == expected
    pairs = list(zip(packed.scored.tolist(), packed.targets.tolist(), strict=True))
    assert len(pairs) == len(set(pairs)), "nothing is scored twice"


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 80))
def test_bins_hold_everything_once_and_keep_to_the_budget(sizes: list[int], budget: int) -> None:
    bins = fill(sizes, budget)
    assert sorted(index for members in bins for index in members) == list(range(len(sizes)))
    for members in bins:
        assert members
        assert sum(sizes[index] for index in members) <= budget or len(members) == 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(50, 200))
def test_bins_are_even(sizes: list[int], budget: int) -> None:
    """No two bins differ by more than the largest thing: the largest go first, each to the emptiest."""
    loads = [sum(sizes[index] for index in members) for members in fill(sizes, budget)]
    assert max(loads) - min(loads) <= max(sizes)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_what_a_kill_leaves_is_cut_as_it_would_have_been(sizes: list[int], budget: int) -> None:
    from lora_exp.engine.reference import _stretches

    whole = _stretches(sizes, budget)
    assert [index for stretch in whole for index in stretch] == list(range(len(sizes)))
    for done in range(1, len(whole)):
        first = whole[done][0]
        assert [[first + index for index in each] for each in _stretches(sizes[first:], budget)] == whole[done:]
