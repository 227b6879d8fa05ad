"""Memory that really runs out: a limit on the process's address space, and steps that need more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp.errors import UserError
from lora_exp.machine import is_out_of_memory
from lora_exp.run_folder import RunFolder
from lora_exp.training.memory import MemoryGuard, OutOfMemory
from lora_exp.validation import validate
from tests.faults.harness import Ended, Server, Tally
from tests.faults.test_kills import COMMON
from tests.runs import composed

ROOM = {"packed": 250 << 20, "padded": 450 << 20}
"""Bytes beyond what the libraries have taken: enough to train in smaller pieces, not in one."""

LARGE = [
    *COMMON, "recipe.max_length=512", "trainer.per_device_train_batch_size=120", "trainer.num_train_epochs=1",
    "trainer.eval_strategy=no", "trainer.gradient_checkpointing=false", "trainer.max_steps=2", "trainer.bf16=false",
    "trainer.save_strategy=steps", "trainer.save_steps=1",
]  # fmt: skip
ENGINES = {
    "packed": ["engine.tokens_per_microbatch=20000"],
    "padded": ["engine=padded", "trainer.per_device_train_batch_size=240"],
}

MORE = {"packed": ["engine.tokens_per_microbatch=1000000"], "padded": []}
"""A budget far above what a batch has."""


def lines(cwd: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (cwd / "run" / "metrics.jsonl").read_text().splitlines()]


def run(server: Server, cwd: Path, engine: str, *overrides: str, limited: bool = True) -> Ended:
    limits = {"RLIMIT_AS": ROOM[engine]} if limited else {}
    return server.run(*LARGE, *ENGINES[engine], *overrides, "output_dir=run", cwd=cwd, limits=limits)


@pytest.mark.faults
@pytest.mark.parametrize("engine", ENGINES)
def test_memory_that_runs_out_is_told_with_what_helps(
    server: Server, tally: Tally, tmp_path: Path, engine: str
) -> None:
    ended = run(server, tmp_path, engine, *MORE[engine])
    tally.inject("out of memory")
    assert ended.status == 2, ended.said
    assert "memory ran out in the stage train" in ended.said
    assert "the run had used up to" in ended.said
    assert "were estimated to need" in ended.said
    helps = {"packed": "engine.tokens_per_microbatch=", "padded": "trainer.per_device_train_batch_size=120"}
    assert helps[engine] in ended.said
    assert "Traceback" not in ended.said
    if engine == "packed":  # half of what fills it, far below the budget
        tokens = re.search(r"([\d,]+) tokens at a time were estimated", ended.said)
        fewer = re.search(r"harm first:\s+engine\.tokens_per_microbatch=(\d+)", ended.said)
        assert tokens is not None, ended.said
        assert fewer is not None, ended.said
        assert int(fewer[1]) == int(tokens[1].replace(",", "")) // 2 < 100_000
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    tally.survive("out of memory")


@pytest.mark.parametrize("engine", ["packed", pytest.param("padded", marks=pytest.mark.faults)])
def test_less_at_a_time_is_found_and_the_batch_of_a_step_stays(
    server: Server, tally: Tally, tmp_path: Path, engine: str
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    ended = run(server, small, engine, "trainer.auto_find_batch_size=true")
    tally.inject("out of memory, less at a time")
    assert ended.status == 0, ended.said
    assert "memory ran out; again from the first step with" in ended.said
    assert run(server, large, engine, limited=False).status == 0
    logged = [lines(small), lines(large)]
    assert [line["step"] for line in logged[0]] == [line["step"] for line in logged[1]]
    for one, other in zip(*logged, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() & {"loss", "num_tokens", "epoch", "learning_rate", "train_loss"}:
            assert one[key] == pytest.approx(other[key], rel=1e-3), key
    tally.survive("out of memory, less at a time")


def test_where_nothing_can_be_smaller_the_rest_of_the_mends_is_told(tmp_path: Path) -> None:
    """Here the weights themselves do not fit: no engine has been chosen yet."""
    guard = MemoryGuard(validate(composed([*COMMON, "recipe=sft"])), RunFolder(tmp_path))

    def load() -> None:
        raise MemoryError

    with pytest.raises(OutOfMemory, match="the weights do not fit") as caught, guard.told():
        load()
    assert caught.value.smaller is None
    assert "quant=8bit" in str(caught.value)


def test_each_way_to_say_so_is_known() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(UserError("no"))
    assert not is_out_of_memory(SystemError("bad argument to internal function"))


CALLS_WITHOUT_MEMORY = """
import mmap, resource, sys
from lora_exp.machine import is_out_of_memory

def down(calls):
    return down(calls - 1) if calls else 0

def fill():
    for size in (2**16, 2**12):
        try:
            while True:
                held.append(mmap.mmap(-1, size))
        except OSError:
            continue

held = []
sys.setrecursionlimit(10**6)
for _ in range(100):
    down(5)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((used << 10) + 2**20, -1))
fill()
try:
    down(10**5)
except (MemoryError, SystemError) as error:
    held.clear()
    print(type(error).__name__, is_out_of_memory(error))
"""


def test_a_call_that_finds_no_memory_for_its_frame_is_a_lack_of_memory() -> None:
    ended = subprocess.run([sys.executable, "-c", CALLS_WITHOUT_MEMORY], capture_output=True, text=True, check=False)
    assert ended.stdout.split()[1:] == ["True"], ended
