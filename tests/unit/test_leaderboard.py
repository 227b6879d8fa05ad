"""The leaderboard: order, intervals, and whether the best two are told apart."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.reports.console import console, leaderboard_table
from lora_exp.sweeps.leaderboard import interval, leaderboard, t_quantile, t_within, write_leaderboard
from lora_exp.sweeps.trials import read_trials
from tests.sweeps import make_sweep, make_trial


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantiles_are_those_of_the_printed_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=5e-4)


@given(st.integers(1, 500), st.floats(0.01, 0.999))
def test_the_quantile_is_where_the_probability_is(freedom: int, confidence: float) -> None:
    assert t_within(t_quantile(freedom, confidence), freedom) == pytest.approx(confidence, abs=1e-9)


def test_an_interval_worked_out_by_hand() -> None:
    # mean 3, standard deviation sqrt(2.5), t of 4 degrees of freedom 2.7764
    found = interval([1, 2, 3, 4, 5])
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((3, 1.03676, 4.96324), abs=1e-4)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    found = interval([0.5])
    assert (found.mean, found.low, found.half) == (0.5, None, None)  # type: ignore[union-attr]
    assert interval([]) is None


def sweep_of(folder: Path, points: Sequence[Sequence[float]], first_seeds: Sequence[int] | None = None) -> Path:
    """Write a trial for each value, a point for each list of them."""
    for rank, values in enumerate(points):
        first = first_seeds[rank] if first_seeds else 1
        for number, value in enumerate(values):
            make_trial(folder / f"{rank}-{number}", {"lora.r": rank}, value, seed=first + number)
    return folder


@pytest.mark.parametrize(
    ("objective", "best"), [("eval_rewards/accuracies", 1), ("eval_loss", 1), ("eval_runtime", None)]
)
def test_the_best_is_first_whichever_way_the_objective_goes(tmp_path: Path, objective: str, best: int | None) -> None:
    # In these runs more accuracy is less loss.
    board = leaderboard(read_trials(sweep_of(tmp_path, [[0.5], [0.9], [0.7]]), objective))
    assert (board.best.axes["lora.r"] if board.best else None) == best


def test_only_finished_trials_have_a_rank(tmp_path: Path) -> None:
    make_trial(tmp_path / "0", {"lora.r": 4}, 0.5)
    for number, status in enumerate(("pruned", "running", "failed"), 1):
        make_trial(tmp_path / str(number), {"lora.r": 4 + number}, 0.99, status=status)
    board = leaderboard(read_trials(tmp_path))
    assert [(point.rank, point.status) for point in board.points] == [
        (1, "finished"), (None, "pruned"), (None, "running"), (None, "failed"),
    ]  # fmt: skip


def test_a_seed_that_failed_leaves_the_mean_of_the_others(tmp_path: Path) -> None:
    make_trial(tmp_path / "0", {}, 0.5, seed=1)
    make_trial(tmp_path / "1", {}, 0.7, seed=2)
    make_trial(tmp_path / "2", {}, None, seed=3)
    (point,) = leaderboard(read_trials(tmp_path)).points
    assert point.objective is not None
    assert point.objective.mean == pytest.approx(0.6)
    assert point.status == "2 finished, 1 failed"


def test_points_that_go_up_and_down_together_are_told_apart_pair_by_pair(tmp_path: Path) -> None:
    # Seeds differ by far more than the points do; within a seed one is always 0.02 better.
    values = [0.1, 0.5, 0.9]
    board = leaderboard(read_trials(sweep_of(tmp_path, [values, [v + 0.02 + v / 1000 for v in values]])))
    assert board.told_apart
    assert "paired t test over 3 seeds" in board.tie


def test_the_same_points_with_other_seeds_are_not(tmp_path: Path) -> None:
    values = [0.1, 0.5, 0.9]
    board = leaderboard(read_trials(sweep_of(tmp_path, [values, [v + 0.02 for v in values]], [1, 11])))
    assert not board.told_apart
    assert "not told apart" in board.tie
    assert "Welch's t test" in board.tie


def test_far_points_with_other_seeds_are_told_apart(tmp_path: Path) -> None:
    board = leaderboard(read_trials(sweep_of(tmp_path, [[0.10, 0.11, 0.12], [0.90, 0.91, 0.92]], [1, 11])))
    assert board.told_apart


@pytest.mark.parametrize(("first_seeds", "test"), [([1, 1], "sign test"), ([1, 11], "permutation test")])
@pytest.mark.parametrize("seeds", range(2, 8))
def test_a_difference_that_never_varies_counts_by_its_seeds_only(
    tmp_path: Path, seeds: int, first_seeds: list[int], test: str
) -> None:
    """Two seeds of an accuracy over 32 rows are often equal, by chance; so a spread of 0 is no certainty."""
    values = [[21 / 32] * seeds, [22 / 32] * seeds]
    board = leaderboard(read_trials(sweep_of(tmp_path, values, first_seeds)))
    outcomes = 2**seeds if test == "sign test" else math.comb(2 * seeds, seeds)
    assert board.told_apart == (2 / outcomes < 0.05)
    assert test in board.tie
    assert "± 0" not in board.tie


def test_equal_points_are_not_told_apart(tmp_path: Path) -> None:
    assert not leaderboard(read_trials(sweep_of(tmp_path, [[0.5] * 9, [0.5] * 9]))).told_apart


def test_one_run_each_tells_nothing_apart(tmp_path: Path) -> None:
    board = leaderboard(read_trials(sweep_of(tmp_path, [[0.1], [0.9]])))
    assert not board.told_apart
    assert "sweep.seeds=5" in board.tie


def test_the_table_has_every_objective_and_its_verdict_after_the_last_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, beta in enumerate((0.1, 0.5)):
        folder = make_trial(
            tmp_path / str(number),
            {"recipe.beta": beta},
            0.5,
            objectives={"eval_rewards/accuracies": 0.5, "eval_loss": 1},
        )
        (folder / "metrics.json").write_text(json.dumps({"eval_loss": beta + 1}))
    board = leaderboard(read_trials(tmp_path))
    leaderboard_table(board, planned=3)
    running = capsys.readouterr().out
    leaderboard_table(board, planned=2)
    ended = capsys.readouterr().out
    assert "eval_loss" in running
    assert "1.5" in running
    assert "cannot be told apart" in ended
    assert "told apart" not in running


@pytest.mark.parametrize("number", [1, 20])
def test_a_narrow_terminal_shows_ranks_and_says_which_settings_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(console, "width", 80)
    for trial in (1, 2):
        settings = {f"trainer.some_setting_{key}": key * trial for key in range(1, number + 1)}
        make_trial(tmp_path / str(trial), settings, trial / 10)
    leaderboard_table(leaderboard(read_trials(tmp_path)))
    said = capsys.readouterr().out
    assert re.search(r"^ +1 .* 0\.2 +finished", said, re.MULTILINE), said
    for key in range(1, number + 1):
        assert re.search(rf"\bsome_setting_{key}\b", said), said
    assert ("too narrow" in said) == (number > 1)


def test_a_single_point_ties_with_nothing(tmp_path: Path) -> None:
    assert leaderboard(read_trials(sweep_of(tmp_path, [[0.1, 0.2]]))).tie == ""


def test_the_files_have_every_trial_in_one_order(tmp_path: Path) -> None:
    board = write_leaderboard(tmp_path, read_trials(make_sweep(tmp_path)))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "leaderboard.csv").read_text())))
    points = json.loads((tmp_path / "leaderboard.json").read_text())["points"]
    assert len(rows) == len(points) == len(board.points) == 9
    for row, written, point in zip(rows, points, board.points, strict=True):
        assert row["rank"] == str(written["rank"] or "")
        assert [float(row[key]) for key in board.axes] == list(written["axes"].values()) == list(point.axes.values())
        assert row["best_run"] in {trial["name"] for trial in written["trials"]}
    names = [trial["name"] for written in points for trial in written["trials"]]
    assert sorted(names, key=int) == [str(number) for number in range(21)]
    assert [written["rank"] for written in points] == [1, 2, 3, 4, 5, 6, None, None, None]


def test_numbers_survive_the_csv(tmp_path: Path) -> None:
    board = write_leaderboard(tmp_path, read_trials(sweep_of(tmp_path, [[0.1, 0.2, 1 / 3]])))
    (row,) = csv.DictReader(io.StringIO((tmp_path / "leaderboard.csv").read_text()))
    found = board.points[0].objective
    assert found is not None
    assert float(row["objective:eval_rewards/accuracies"]) == found.mean
    assert float(row["high"]) == found.high
    assert math.isclose(float(row["eval_rewards/accuracies"]), found.mean)


def test_no_trials_make_an_empty_board() -> None:
    board = leaderboard([])
    assert board.best is None
    assert not board.points


def test_no_clock_is_in_the_files(tmp_path: Path) -> None:
    found = []
    for seconds in (1.0, 2.0):
        folder = sweep_of(tmp_path / str(seconds), [[0.1, 0.2], [0.3]])
        for trial in folder.iterdir():
            run, metrics = (json.loads((trial / name).read_text()) for name in ("run.json", "metrics.json"))
            (trial / "run.json").write_text(json.dumps({**run, "wall_times": {"train": seconds}}))
            (trial / "metrics.json").write_text(json.dumps({**metrics, "train_runtime": seconds}))
        write_leaderboard(folder, read_trials(folder))
        found.append([(folder / name).read_text() for name in ("leaderboard.csv", "leaderboard.json")])
    assert found[0] == found[1]
