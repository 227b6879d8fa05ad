"""What the machine decides: each choice follows from what is there, can be set, and says its reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp import machine
from lora_exp.engine import settings

GIB = 2**30


class Model:
    """A Llama-shaped model of a known size, without weights."""

    device = torch.device("cpu")

    def __init__(self, width: int = 512, layers: int = 4) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "vocab_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        with torch.device("meta"):
            self.base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape, **heads))

    def get_base_model(self) -> Any:
        return self.base


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_free(number: int) -> None:
        monkeypatch.setattr(settings, "free_memory_bytes", lambda _: number)

    return set_free


def test_where_memory_is_plenty_the_device_is_used_fully(free: Any) -> None:
    free(100 * GIB)
    choice = settings.choose_tokens("auto", Model())
    assert choice.value == settings.TOKENS["cpu"]


def test_where_memory_is_short_a_microbatch_fits_into_it(free: Any) -> None:
    model = Model()
    free(GIB // 8)
    choice = settings.choose_tokens("auto", model)
    assert settings.LEAST_TOKENS <= choice.value < settings.TOKENS["cpu"]
    assert choice.value * settings.bytes_per_token(model) <= GIB // 8
    assert "128 MiB" in choice.reason


def test_what_the_user_sets_stays(free: Any) -> None:
    free(1)
    assert settings.choose_tokens(77, Model()).value == 77
    assert settings.choose_checkpointing(False, Model(), 10**6).value is False
    free(100 * GIB)
    assert settings.choose_checkpointing(True, Model(), 1).value is True


def test_activations_are_recomputed_only_if_they_do_not_fit(free: Any) -> None:
    model = Model()
    need = 1000 * settings.bytes_per_token(model)
    free(int(need / settings.SHARE) + 1)
    assert settings.choose_checkpointing("auto", model, 1000).value is False
    free(int(need / settings.SHARE) - 1000)
    assert settings.choose_checkpointing("auto", model, 1000).value is True


def test_the_estimate_grows_with_depth_and_width() -> None:
    small = settings.bytes_per_token(Model())
    assert settings.bytes_per_token(Model(layers=8)) == 2 * small
    assert settings.bytes_per_token(Model(width=1024)) == 2 * small


def test_a_containers_limit_counts_as_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert machine.free_memory_bytes(torch.device("cpu")) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory_bytes(torch.device("cpu")) > 3_000_000


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", None), ("50000 100000", 1), ("100000 100000", 1)])
def test_cores_are_those_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int | None
) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert machine.usable_cores() == (cores or len(os.sched_getaffinity(0)))


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.use_threads(1) == "1 thread: engine.num_threads=1"
    assert torch.get_num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" in machine.use_threads("auto")
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.use_threads("auto")
    assert torch.get_num_threads() == machine.usable_cores()


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
