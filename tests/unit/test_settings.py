"""What the machine decides: each choice follows from what is there, can be set, and says its reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_exp import machine
from lora_exp.engine import settings

GIB = 2**30
CPU = torch.device("cpu")


@dataclass
class Forecast:
    """A run of which each token takes as much as the next, and half where activations are recomputed."""

    room: int
    bytes_per_token: int = 2**20
    fixed: int = 2**28
    device: Any = CPU

    def need(self, engine: str, tokens: int | None, checkpointing: bool) -> int:
        return self.fixed + (tokens or 4096) * self.bytes_per_token // (2 if checkpointing else 1)

    def require(self, engine: str, tokens: int | None, checkpointing: bool) -> None:
        raise NotImplementedError


def test_where_memory_is_plenty_the_device_is_used_fully() -> None:
    choice = settings.choose_tokens("auto", "packed", "auto", Forecast(100 * GIB))
    assert choice == settings.Choice(settings.TOKENS["cpu"], "more would not be faster")


@given(st.integers(GIB // 2, 2 * GIB), st.integers(2**10, 2**22))
def test_a_micro_batch_fits_or_is_the_smallest(room: int, size: int) -> None:
    forecast = Forecast(room, size)
    tokens = settings.choose_tokens("auto", "packed", "auto", forecast).value
    fits = forecast.need("packed", tokens, False) <= settings.SHARE * room
    assert fits or tokens == settings.LEAST_TOKENS
    more = forecast.need("packed", tokens + 2, False) <= settings.SHARE * room
    assert tokens == settings.TOKENS["cpu"] or not more


def test_what_is_asked_for_is_taken() -> None:
    small, large = Forecast(1), Forecast(100 * GIB)
    assert settings.choose_tokens(77, "packed", "auto", small).value == 77
    assert settings.choose_checkpointing(False, "packed", 10**6, small).value is False
    assert settings.choose_checkpointing(True, "packed", 1, large).value is True


@pytest.mark.parametrize("tokens", [1000, None])
def test_activations_are_recomputed_only_if_they_do_not_fit(tokens: int | None) -> None:
    need = Forecast(0).need("packed", tokens, False)
    enough, too_little = Forecast(int(need / settings.SHARE) + 1), Forecast(int(need / settings.SHARE) - 1000)
    assert settings.choose_checkpointing("auto", "packed", tokens, enough).value is False
    assert settings.choose_checkpointing("auto", "packed", tokens, too_little).value is True


def test_a_containers_limit_counts_as_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert machine.free_memory_bytes(torch.device("cpu")) == 2_000_000
    (tmp_path / "memory.stat").write_text("anon 5\nfile 900\ninactive_file 300\nactive_file 200\n")
    assert machine.free_memory_bytes(torch.device("cpu")) == 2_000_500
    (tmp_path / "memory.current").write_text("9000000\n")
    assert machine.free_memory_bytes(torch.device("cpu")) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory_bytes(torch.device("cpu")) > 3_000_000


def test_freed_memory_is_kept_and_given_back(tmp_path: Path) -> None:
    """In a process of its own: what malloc is told stays. Pages are counted as the system counts faults."""
    import subprocess
    import sys

    script = """
import resource, numpy
from lora_exp.machine import keep_freed_memory, return_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(2**23)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = [faults() for _ in range(3)][-1]
kept = keep_freed_memory()
again = [faults() for _ in range(3)][-1]
return_freed_memory()
print(usual, kept, again, faults())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    usual, kept, again, after = done.stdout.split()
    if kept == "False":
        pytest.skip("this malloc is not glibc's")
    assert int(again) < int(usual) / 10
    assert int(after) > int(usual) / 2
