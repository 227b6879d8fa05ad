"""Trials read back: their axes, their order, and whatever a killed run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_exp.errors import UserError
from lora_exp.sweeps.leaderboard import leaderboard
from lora_exp.sweeps.question import Question
from lora_exp.sweeps.trials import direction, read_trials, sweep_command
from tests.sweeps import make_sweep, make_trial


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eval_loss", "minimize"),
        ("train_loss", "minimize"),
        ("eval_kl/chosen", "minimize"),
        ("eval_rewards/accuracies", "maximize"),
        ("eval_rewards/margins", "maximize"),
        ("eval_mean_token_accuracy", "maximize"),
        ("eval_rewards/rejected", "minimize"),
    ],
)
def test_the_name_of_an_objective_tells_its_direction(name: str, expected: str) -> None:
    assert direction(name) == expected


def test_a_given_direction_goes_before_the_name(tmp_path: Path) -> None:
    for name, objective in (("0", 0.4), ("1", 0.6)):
        make_trial(tmp_path / name, {"recipe.beta": objective}, objective, direction="minimize")
    trials = read_trials(tmp_path)
    assert {trial.direction for trial in trials} == {"minimize"}
    assert [point.best.name for point in leaderboard(trials).points] == ["0", "1"]
    assert {trial.direction for trial in read_trials(tmp_path, "eval_rewards/margins")} == {"maximize"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"trainer.max_steps": 400, "trainer.num_train_epochs": 3}, "running, 25%"),
        ({"trainer.max_steps": -1, "trainer.num_train_epochs": 3}, "running"),
    ],
)
def test_a_running_trial_says_how_far_it_is(tmp_path: Path, settings: dict[str, int], expected: str) -> None:
    make_trial(tmp_path / "0", settings, status="running")
    assert leaderboard(read_trials(tmp_path)).points[0].status == expected


def test_axes_are_the_settings_that_differ(tmp_path: Path) -> None:
    make_sweep(tmp_path, seeds=2)
    for trial in read_trials(tmp_path):
        assert list(trial.axes) == ["lora.r", "recipe.beta"]
        assert trial.axes["recipe.beta"] == trial.config["recipe.beta"]


def test_a_sweeps_own_axes_are_there_from_its_first_trial_and_stand_for_what_follows(tmp_path: Path) -> None:
    varied = ["recipe.max_length", "recipe.max_prompt_length", "seed"]
    Question(["recipe.max_length", "seed"], varied, {"lora.r": 8}).write(tmp_path)
    make_trial(tmp_path / "0", {"recipe.max_length": 128, "recipe.max_prompt_length": 64}, 0.5, seed=1)
    assert [dict(trial.axes) for trial in read_trials(tmp_path)] == [{"recipe.max_length": 128}]
    make_trial(tmp_path / "1", {"recipe.max_length": 256, "recipe.max_prompt_length": 128}, 0.5, seed=2)
    assert [list(trial.axes) for trial in read_trials(tmp_path)] == [["recipe.max_length"]] * 2
    extended = {"recipe.max_length": 256, "recipe.max_prompt_length": 128, "lora.r": 99}
    make_trial(tmp_path / "2", extended, 0.5, seed=2)
    assert [list(trial.axes) for trial in read_trials(tmp_path)] == [["recipe.max_length", "lora.r"]] * 3


def test_what_the_config_computes_from_an_axis_is_none_of_its_own(tmp_path: Path) -> None:
    common = {"recipe.max_prompt_length": "${half:${.max_length}}", "trainer.learning_rate": "${recipe.learning_rate}"}
    Question(["recipe.max_length"], [], common).write(tmp_path)
    for length in (128, 256):
        make_trial(tmp_path / str(length), {"recipe.max_length": length, "recipe.max_prompt_length": length // 2}, 0.5)
    assert [list(trial.axes) for trial in read_trials(tmp_path)] == [["recipe.max_length"]] * 2
    # Set by hand in an extension, it is no longer told by the axis.
    extended = {"recipe.max_length": 128, "recipe.max_prompt_length": 64, "trainer.learning_rate": 0.5}
    make_trial(tmp_path / "x", extended, 0.5)
    assert [list(trial.axes) for trial in read_trials(tmp_path)] == [["recipe.max_length", "trainer.learning_rate"]] * 3


def test_seeds_folders_and_trackers_make_no_axis(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        make_trial(tmp_path / str(seed), {}, 0.5, seed=seed)
    trials = read_trials(tmp_path)
    assert [dict(trial.axes) for trial in trials] == [{}, {}, {}]
    assert [trial.seed for trial in trials] == [1, 2, 3]


def test_one_number_written_in_two_ways_is_one_value(tmp_path: Path) -> None:
    make_trial(tmp_path / "0", {"lora.lora_alpha": 32}, 0.5)
    make_trial(tmp_path / "1", {"lora.lora_alpha": 32.0}, 0.6)
    assert all(not trial.axes for trial in read_trials(tmp_path))


def test_a_choice_stands_for_the_keys_that_follow_from_it(tmp_path: Path) -> None:
    for number, (option, dora, rank) in enumerate([("lora", False, 4), ("lora", False, 8), ("dora", True, 4)]):
        choices = {"choices": {"recipe": "dpo", "lora": option}}
        make_trial(tmp_path / str(number), {"lora.use_dora": dora, "lora.r": rank}, 0.5, **choices)
    assert [dict(trial.axes) for trial in read_trials(tmp_path)] == [
        {"lora": "lora", "lora.r": 4},
        {"lora": "lora", "lora.r": 8},
        {"lora": "dora", "lora.r": 4},
    ]


def test_a_run_that_failed_early_has_the_choices_that_hydra_noted(tmp_path: Path) -> None:
    make_trial(tmp_path / "0", {"lora.use_dora": False}, 0.5, choices={"lora": "lora"})
    failed = make_trial(tmp_path / "1", {"lora.use_dora": True}, choices=None)
    (failed / ".hydra" / "hydra.yaml").write_text(
        "hydra:\n  runtime:\n    choices:\n      lora: dora\n      hydra/help: x\n  verbose: false\n"
    )
    assert [dict(trial.axes) for trial in read_trials(tmp_path)] == [{"lora": "lora"}, {"lora": "dora"}]


def test_folder_9_comes_before_folder_10(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        make_trial(tmp_path / str(number), {"lora.r": number}, 0.5)
    assert [trial.name for trial in read_trials(tmp_path)] == ["1", "9", "10"]


def tear(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[: len(text) // 2])


def mangle(path: Path) -> None:
    """Put what a failing disk may leave before what is right."""
    path.write_text("\x00{: [\n" + path.read_text())


@pytest.mark.parametrize(
    "name", ["run.json", "config.yaml", "metrics.json", "metrics.jsonl", "samples.jsonl", ".hydra/overrides.yaml"]
)
@pytest.mark.parametrize("damage", [Path.unlink, tear, lambda path: path.write_text(""), mangle])
def test_a_half_written_folder_is_listed(tmp_path: Path, name: str, damage: Any) -> None:
    make_trial(tmp_path / "0", {"lora.r": 4}, 0.5)
    damage(make_trial(tmp_path / "1", {"lora.r": 8}, 0.6) / name)
    trials = read_trials(tmp_path)
    assert [trial.name for trial in trials] == ["0", "1"]
    assert trials[0].objective == 0.5
    assert isinstance([trials[1].steps, trials[1].samples, trials[1].command], list)


def test_a_folder_that_only_hydra_wrote_to_is_listed_as_failed(tmp_path: Path) -> None:
    make_trial(tmp_path / "0", {}, 0.5)
    (tmp_path / "1" / ".hydra").mkdir(parents=True)
    trial = read_trials(tmp_path)[1]
    assert trial.status == "failed"
    assert "no run.json" in (trial.error or "")


def test_an_objective_that_is_no_number_is_none(tmp_path: Path) -> None:
    folder = make_trial(tmp_path / "0", {}, status="finished")
    (folder / "metrics.json").write_text('{"eval_rewards/accuracies": null}')
    assert read_trials(tmp_path)[0].objective is None


def test_another_objective_can_be_named(tmp_path: Path) -> None:
    make_trial(tmp_path / "0", {}, 0.6)
    trial = read_trials(tmp_path, "eval_loss")[0]
    assert (trial.objective, trial.direction) == (pytest.approx(0.5), "minimize")


def test_the_command_runs_the_trial_again(tmp_path: Path) -> None:
    make_trial(tmp_path / "0", {"recipe.beta": 0.5, "data.train_file": "my data.jsonl"}, 0.5, seed=7)
    command = "python -m lora_exp recipe.beta=0.5 'data.train_file=my data.jsonl' seed=7"
    assert read_trials(tmp_path)[0].command == command


def test_the_command_of_the_sweep_is_hydras_note_of_it(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text(
        "hydra:\n  overrides:\n    task:\n    - seed=1,2\n    - recipe=dpo\n  job:\n"
    )
    assert sweep_command(tmp_path) == "python -m lora_exp -m seed=1,2 recipe=dpo"
    assert sweep_command(tmp_path / "nothing") == ""


def test_a_run_and_a_sweep_are_read_together_each_run_once(tmp_path: Path) -> None:
    sweep, run = make_sweep(tmp_path / "sweep", seeds=1), make_trial(tmp_path / "run", {}, 0.5)
    names = [trial.name for trial in read_trials([sweep, run, sweep / "0"])]
    assert names == ["run", *(f"sweep/{number}" for number in range(9))]


def test_every_folder_without_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        read_trials([tmp_path / "empty", tmp_path / "nowhere"])
    assert [problem.what for problem in caught.value.problems] == ["holds no run", "is no folder"]
