"""Packing loses nothing: from a flat row every row of the padded batch can be read again, scores and all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.data.kinds import IGNORED
from lora_exp.engine.layout import Sight
from lora_exp.engine.packing import Family, Row, families, fill, microbatches, pack

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


ACROSS = pytest.mark.parametrize("across", [True, False])


@ACROSS
@given(batches())
def test_every_row_is_there_with_its_positions(across: bool, batch: tuple[list[Row], int]) -> None:
    rows, per_example = batch
    packed = pack(families(rows, per_example), across)
    assert packed.places.keys() == {row.index for row in rows}
    for row in rows:
        places = packed.places[row.index]
        assert packed.ids[places].tolist() == row.ids.tolist()
        assert packed.positions[places].tolist() == list(range(len(row)))


def test_rows_may_go_on_from_one_another_more_often_than_calls_nest() -> None:
    """As the turns of a conversation do, each a row that ends later; here a token later."""
    rows = [Row(index, np.zeros(index + 1, dtype=int), np.zeros(index + 1, dtype=int)) for index in range(1100)]
    packed = pack(families(rows, 1))
    for row in rows:
        assert packed.positions[packed.places[row.index]].tolist() == list(range(len(row)))
    assert len(packed.sources) == sum(len(row) - 1 for row in rows)


def starts(rows: Sequence[Row]) -> set[tuple[int, ...]]:
    """Return every start that some row has, of one token and more."""
    return {tuple(row.ids[: place + 1].tolist()) for row in rows for place in range(len(row))}


@given(batches())
def test_every_start_is_computed_once(batch: tuple[list[Row], int]) -> None:
    rows, per_example = batch
    members = families(rows, per_example)
    assert len(pack(members).ids) == len(starts(rows))
    assert len(pack(members, across=False).ids) == sum(len(starts(family.rows)) for family in members)


@given(batches())
def test_a_family_by_itself_takes_what_is_said_of_it(batch: tuple[list[Row], int]) -> None:
    rows, per_example = batch
    for family in families(rows, per_example):
        assert len(family) == len(pack([family]).ids)


@ACROSS
@given(batches())
def test_a_token_is_seen_by_what_goes_on_from_it(across: bool, batch: tuple[list[Row], int]) -> None:
    """By two numbers a token: that is all that attention knows of the rows."""
    rows, per_example = batch
    packed = pack(families(rows, per_example), across)
    place = np.arange(len(packed.ids))
    seen = Sight.of(packed.segments).seen(place[:, None], place[None], None)
    expected = np.zeros_like(seen)
    for places in packed.places.values():
        expected[np.ix_(places, places)] |= np.tri(len(places), dtype=bool)
    assert np.array_equal(seen, expected)


@ACROSS
@given(batches())
def test_each_scored_token_has_its_place_and_the_position_before_it(across: bool, batch: tuple[list[Row], int]) -> None:
    rows, per_example = batch
    packed = pack(families(rows, per_example), across)
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


@ACROSS
@given(batches(), st.integers(1, 40))
def test_micro_batches_hold_everything_once_and_keep_to_the_budget(
    across: bool, batch: tuple[list[Row], int], budget: int
) -> None:
    members = families(*batch)
    found = microbatches([[family] for family in members], budget, across)
    assert sorted(index for each in found for index in each) == list(range(len(members)))
    for each in found:
        tokens = len(pack([members[index] for index in each], across).ids)
        assert tokens <= budget or len(each) == 1


def test_rows_that_share_all_that_fits_are_alone() -> None:
    members = families([Row(0, np.array([0]), np.array([0])), Row(1, np.array([0, 0]), np.array([0, 0]))], 1)
    assert microbatches([[family] for family in members], 1) == [[0], [1]]


def test_what_rows_share_takes_its_room_once() -> None:
    ids = [np.array([0] * 10 + [1 + row] * 5) for row in range(4)]
    units = [[Family((Row(row, each, each),))] for row, each in enumerate(ids)]
    assert len(microbatches(units, 30)) == 1
    assert len(microbatches(units, 30, across=False)) == 2


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_what_a_kill_leaves_is_cut_as_it_would_have_been(sizes: list[int], budget: int) -> None:
    from lora_exp.engine.reference import _stretches

    whole = _stretches(sizes, budget)
    assert [index for stretch in whole for index in stretch] == list(range(len(sizes)))
    for done in range(1, len(whole)):
        first = whole[done][0]
        assert [[first + index for index in each] for each in _stretches(sizes[first:], budget)] == whole[done:]
