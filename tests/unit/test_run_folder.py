"""The run folder: each file whole or not there, no run lost, and a status that tells the truth."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.errors import Problem, UserError
from lora_exp.run_folder import RunFolder, holds_run, to_json, write_whole

OLD = "old\n" * 500_000
NEW = "new\n" * 500_000
REPOSITORY = Path(__file__).parents[2]


def run_json(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


# Files.


@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r")))
def test_a_text_is_written_as_it_is(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "text"
    write_whole(path, text)
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("before", [OLD, None], ids=["there is an old one", "there is none"])
def test_a_write_that_fails_midway_leaves_what_was_there(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before, encoding="utf-8")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, NEW + "\ud800")
    assert (path.read_text(encoding="utf-8") if path.exists() else None) == before


FULL_DISK = """
import resource, sys
from pathlib import Path
from lora_exp.run_folder import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    write_whole(Path(sys.argv[1]), "new\\n" * 500_000)
except OSError:
    sys.exit(3)
"""


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(OLD, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], cwd=REPOSITORY, timeout=60)
    assert done.returncode == 3, "the write did not fail"
    assert path.read_text(encoding="utf-8") == OLD


WRITE_WITHOUT_END = """
import sys
from pathlib import Path
from lora_exp.run_folder import write_whole
while True:
    write_whole(Path(sys.argv[1]), "new\\n" * 500_000)
    write_whole(Path(sys.argv[1]), "old\\n" * 500_000)
"""


def test_a_reader_and_a_kill_at_any_moment_find_the_old_text_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(OLD, encoding="utf-8")
    seen = set()
    with subprocess.Popen([sys.executable, "-c", WRITE_WITHOUT_END, str(path)], cwd=REPOSITORY) as writer:
        deadline = time.monotonic() + 30
        reads = 0
        while (len(seen) < 2 or reads < 200) and time.monotonic() < deadline:
            seen.add(path.read_text(encoding="utf-8"))
            reads += 1
        writer.kill()
    seen.add(path.read_text(encoding="utf-8"))
    assert seen == {OLD, NEW}


# JSON.


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=refuse_constant)


numbers = st.floats() | st.integers() | st.none() | st.booleans() | st.text()
values = st.recursive(numbers, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


def without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return value


@given(value=values)
def test_numbers_that_json_does_not_know_become_null_and_nothing_else_changes(value: Any) -> None:
    assert strict(to_json(value)) == without_nan(value)
    assert "\n" not in to_json(value, indent=None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_become_null_in_every_file(tmp_path: Path, value: float) -> None:
    folder = RunFolder(tmp_path)
    folder.note(objective=value)
    folder.write_json("metrics.json", {"eval_loss": value, "inner": [(value,)]})
    folder.write_jsonl("samples.jsonl", [{"loss": value}, {"loss": 1.0}])
    assert strict((tmp_path / "run.json").read_text(encoding="utf-8"))["objective"] is None
    assert strict((tmp_path / "metrics.json").read_text(encoding="utf-8")) == {"eval_loss": None, "inner": [[None]]}
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [strict(line) for line in lines] == [{"loss": None}, {"loss": 1.0}]


def test_values_that_json_does_not_know_become_text() -> None:
    assert strict(to_json({"folder": Path("a") / "b"})) == {"folder": "a/b"}


# Claims.


def test_a_new_folder_is_made_and_says_that_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "outputs" / "run"
    with RunFolder(path).open("seed: 1\n", resumed=False):
        assert run_json(path)["status"] == "running"
        assert (path / "config.yaml").read_text(encoding="utf-8") == "seed: 1\n"
        assert holds_run(path)
    assert {"python", "torch", "trl", "peft", "transformers"} <= set(run_json(path)["versions"])


def test_a_run_that_ends_well_is_finished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.open("", resumed=False) as opened:
        assert opened is folder
        folder.note(objective=0.5)
    found = run_json(tmp_path)
    assert (found["status"], found["objective"], found["error"]) == ("finished", 0.5, None)
    assert found["started"] <= found["ended"]


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), UserError("bad rows", [Problem("a:1", "x")]), KeyboardInterrupt()]
)
def test_a_run_that_raises_is_failed_and_says_why_and_the_error_goes_on(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, RunFolder(tmp_path).open("", resumed=False):
        raise error
    assert caught.value is error
    found = run_json(tmp_path)
    assert found["status"] == "failed"
    assert found["error"].startswith(type(error).__name__)
    assert str(error) in found["error"]


def try_to_open(path: Path, resumed: bool = False) -> UserError | None:
    try:
        with RunFolder(path).open("", resumed):
            return None
    except UserError as error:
        return error


@pytest.fixture
def failed(tmp_path: Path) -> Path:
    """Make a run that failed before its first step."""
    with pytest.raises(ValueError, match="early"), RunFolder(tmp_path).open("", resumed=False):
        raise ValueError("early")
    return tmp_path


def test_a_folder_with_a_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    assert try_to_open(tmp_path) is None
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    error = try_to_open(tmp_path)
    assert error is not None
    assert error.problems[0].where == "output_dir"
    assert f"resume={tmp_path}" in error.problems[0].mend
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_a_folder_whose_run_is_still_running_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path).open("", resumed=False):
        assert try_to_open(tmp_path) is not None


def test_a_folder_whose_run_failed_before_any_step_is_free(failed: Path) -> None:
    assert not holds_run(failed)
    assert try_to_open(failed) is None
    assert run_json(failed)["status"] == "finished"
    assert run_json(failed)["error"] is None


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints"])
def test_a_failed_run_that_logged_a_step_or_saved_one_is_kept(failed: Path, left: str) -> None:
    if left == "checkpoints":
        (failed / left / "checkpoint-1").mkdir(parents=True)
    else:
        (failed / left).write_text('{"loss": 1.0}\n', encoding="utf-8")
    assert holds_run(failed)
    assert try_to_open(failed) is not None
    assert run_json(failed)["status"] == "failed"


def test_a_folder_that_cannot_be_understood_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    assert holds_run(tmp_path)
    assert try_to_open(tmp_path) is not None


def test_other_files_in_a_folder_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert not holds_run(tmp_path)
    assert try_to_open(tmp_path) is None
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_resumed_run_goes_on_in_its_folder(failed: Path) -> None:
    (failed / "metrics.jsonl").write_text('{"loss": 1.0}\n', encoding="utf-8")
    assert try_to_open(failed, resumed=True) is None
    assert run_json(failed)["status"] == "finished"
    assert (failed / "metrics.jsonl").read_text(encoding="utf-8") == '{"loss": 1.0}\n'


def test_where_there_is_no_run_none_can_be_resumed(tmp_path: Path) -> None:
    assert try_to_open(tmp_path, resumed=True) is not None
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("place", ["taken", "taken/run"], ids=["the folder", "a folder above it"])
def test_a_file_where_the_folder_should_be_is_told_as_such(tmp_path: Path, place: str) -> None:
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    error = try_to_open(tmp_path / place)
    assert error is not None
    assert "holds a run" not in str(error)
    assert "output_dir" in str(error)


def sleep_and_raise() -> None:
    time.sleep(0.01)
    raise ValueError("late")


def test_stages_are_timed_also_where_they_raise_and_add_up(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.stage("data"):
        time.sleep(0.01)
    first = folder.wall_times["data"]
    with pytest.raises(ValueError, match="late"), folder.stage("data"):
        sleep_and_raise()
    folder.note()
    assert 0 < first < folder.wall_times["data"]
    assert run_json(tmp_path)["wall_times"] == folder.wall_times
