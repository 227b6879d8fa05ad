"""The thread count follows from the config, the record, the environment and the cores, in this order."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_exp.process import threads
from lora_exp.process.spin import OWN_SETTINGS
from lora_exp.process.start import NVML_CHECK, start_process
from lora_exp.process.threads import recorded_threads, usable_cores, use_threads

VARIABLES = (*OWN_SETTINGS, "OMP_NUM_THREADS", NVML_CHECK)


@pytest.fixture(autouse=True)
def _unset() -> Iterator[None]:
    """Set nothing, and leave the count of this process and its environment as they were."""
    before, environment = torch.get_num_threads(), dict(os.environ)
    for name in VARIABLES:
        os.environ.pop(name, None)
    yield
    torch.set_num_threads(before)
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", None), ("50000 100000", 1), ("100000 100000", 1)])
def test_cores_are_those_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int | None
) -> None:
    monkeypatch.setattr(threads, "CPU_QUOTA", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert usable_cores() == (cores or len(os.sched_getaffinity(0)))


# The count ------------------------------------------------------------------------------------------


def test_the_config_overrides_the_record_the_record_the_environment_and_that_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def used(said: str) -> tuple[int, str]:
        return torch.get_num_threads(), said.partition(": ")[2].partition(";")[0]

    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert used(use_threads(5, 4)) == (5, "engine.num_threads=5")
    assert used(use_threads("auto", 4)) == (4, "as the run began")
    assert used(use_threads("auto")) == (3, "OMP_NUM_THREADS"), "and not the count of an earlier run of this process"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert used(use_threads("auto")) == (usable_cores(), "the cores that this process may use")
    monkeypatch.setenv("OMP_NUM_THREADS", "many")  # OpenMP itself says that it ignores that
    assert used(use_threads("auto")) == (usable_cores(), "the cores that this process may use")


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        '{"device": {"threa',
        "[]",
        "null",
        "{}",
        '{"device": null}',
        '{"device": {"type": "cpu"}}',
        '{"device": {"threads": "2"}}',
        '{"device": {"threads": 0}}',
        '{"device": {"threads": true}}',
        '{"device": {"threads": null}}',
    ],
)
def test_a_run_that_does_not_say_its_count_has_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert recorded_threads(tmp_path) is None
    (tmp_path / "run.json").write_text(json.dumps({"device": {"threads": 3}}))
    assert recorded_threads(tmp_path) == 3


def test_the_choice_is_said_where_there_are_idle_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    free = "; idle ones spin only while cores are free" if sys.platform == "linux" else ""
    assert use_threads(2) == f"2 threads: engine.num_threads=2{free}"
    assert use_threads(1) == "1 thread: engine.num_threads=1"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert use_threads(2).endswith("; idle ones wait by GOMP_SPINCOUNT=7")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert use_threads(2).endswith("; idle ones wait by OMP_WAIT_POLICY=PASSIVE")


@pytest.mark.parametrize("given", ["0", None])
def test_cuda_is_looked_for_without_starting_it(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.setenv("LORA_EXP_ALLOCATOR", "system")  # this process goes on
    if given is not None:
        monkeypatch.setenv(NVML_CHECK, given)
    start_process()
    assert os.environ[NVML_CHECK] == (given or "1")
