"""A process starts anew on mimalloc, once, where nobody chose another allocator, and hands nothing of it on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp import allocator

SCRIPT = """
import json, os, sys
from lora_exp.allocator import allocator_name, restart_with_mimalloc
restart_with_mimalloc()
import torch
from lora_exp.machine import return_freed_memory
def held():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = held()
tensors = [torch.ones(2**19) for _ in range(40)]
del tensors[::2]
again = [torch.ones(2**19) for _ in range(20)]
full = held()
del tensors, again
return_freed_memory()
print(json.dumps({
    "allocator": allocator_name(),
    "arguments": sys.argv[1:],
    "handed on": sorted(name for name in os.environ if name.startswith(("LD_PRELOAD", "MIMALLOC"))),
    "grew": full - before,
    "left": held() - before,
}))
"""
TENSORS = 40 * 2**21

needs_mimalloc = pytest.mark.skipif(allocator._library() is None, reason="no mimalloc for this system")


def run(**environment: str) -> dict[str, object]:
    clean = {name: value for name, value in os.environ.items() if name not in (allocator.PRELOADED, allocator.CHOICE)}
    command = [sys.executable, "-c", SCRIPT, "recipe=dpo", "a b"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**clean, **environment})
    found: dict[str, object] = json.loads(done.stdout)
    return found


@needs_mimalloc
def test_a_process_runs_on_mimalloc_and_says_so() -> None:
    found = run()
    assert found["allocator"] == "mimalloc"
    assert found["arguments"] == ["recipe=dpo", "a b"]
    assert found["handed on"] == []


@needs_mimalloc
def test_a_freed_tensors_place_is_used_again_and_given_back_when_asked() -> None:
    found = run()
    assert TENSORS <= found["grew"] < 1.1 * TENSORS
    assert found["left"] < 0.1 * TENSORS


def test_the_systems_own_stays_where_it_is_asked_for() -> None:
    assert run(LORA_EXP_ALLOCATOR="system")["allocator"] == "system"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's loader")
def test_another_choice_is_respected() -> None:
    found = run(LD_PRELOAD="libc.so.6")
    assert found["allocator"] == "system"
    assert found["handed on"] == ["LD_PRELOAD"]


@needs_mimalloc
def test_a_library_that_lacks_what_it_needs_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a small container without libatomic, where the loader would end the process before its first line."""
    whole = allocator._library()
    assert whole is not None
    assert b"\0libatomic.so.1\0" in whole.read_bytes()
    lacking = tmp_path / allocator.LIBRARY
    lacking.parent.mkdir(parents=True)
    lacking.write_bytes(whole.read_bytes().replace(b"\0libatomic.so.1\0", b"\0libabsent.so.1\0"))
    started = subprocess.run([sys.executable, "-c", ""], env={**os.environ, "LD_PRELOAD": str(lacking)}, check=False)
    assert started.returncode == 127, "the loader must refuse it for this test to mean anything"
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert allocator._library() is None
    allocator.restart_with_mimalloc()
