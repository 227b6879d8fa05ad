"""Which device a run takes, by what torch says is there. torch's answers are stand-ins: no accelerator is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp import machine
from lora_exp.engine import flex
from lora_exp.engine.forward import PackedForward
from lora_exp.errors import UserError
from lora_exp.models.precision import choose_precision
from lora_exp.process.device import choose_device, hide_gpus
from lora_exp.training.arguments import on_one_device
from lora_exp.training.saving import _random_states
from lora_exp.validation import validate
from tests.runs import composed

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@dataclass
class Machine:
    """What torch says of a machine.

    Args:
        built: The accelerator that torch is built for.
        there: Whether such a device is there.
        gpus: How many CUDA sees.
        capability: Of each.
        failure: What starting CUDA raises.
    """

    built: str | None = None
    there: bool = True
    gpus: int = 0
    capability: tuple[int, int] = (9, 0)
    failure: Exception | None = None

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        def accelerator(check_available: bool = False) -> Any:
            return None if self.built is None or (check_available and not self.there) else torch.device(self.built)

        def start() -> None:
            if self.failure is not None:
                raise self.failure

        patch.setattr(torch.accelerator, "current_accelerator", accelerator)
        patch.setattr(torch.cuda, "init", start)
        patch.setattr(torch.cuda, "device_count", lambda: self.gpus)
        patch.setattr(torch.cuda, "is_available", lambda: self.built == "cuda" and self.there)
        patch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        patch.setattr(torch.cuda, "get_device_capability", lambda _: self.capability)


TOO_OLD = RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

AUTO = [
    (Machine(), "cpu: this torch is built for the CPU alone"),
    (Machine("cuda", there=False), "cpu: this torch is built for cuda, and finds no such device"),
    (
        Machine("cuda", gpus=1, failure=TOO_OLD),
        "cpu: CUDA does not start: The NVIDIA driver on your system is too old (found version 11040).",
    ),
    (Machine("cuda", gpus=0), "cpu: CUDA does not start: it shows no GPU"),
    (Machine("cuda", gpus=1), "cuda:0: a GPU, the GPU of this machine"),
    (Machine("cuda", gpus=3), "cuda:0: a GPU, the first of 3 GPUs; idle: cuda:1, cuda:2"),
    (Machine("mps"), "cpu: training on mps is untested; device=mps tries it"),
    (Machine("xpu"), "cpu: training on xpu is untested; device=xpu tries it"),
    (Machine("mps", there=False), "cpu: this torch is built for mps, and finds no such device"),
    (Machine("hpu"), "cpu: this machine has hpu"),
]


@pytest.mark.parametrize(("there", "line"), AUTO, ids=[line for _, line in AUTO])
def test_auto_takes_what_is_there_and_says_why(there: Machine, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there.stand_in(monkeypatch)
    assert choose_device("auto", use_cpu=False).line == line


GIVEN = [
    ("cpu", Machine("cuda", gpus=2), "cpu: device=cpu"),
    ("cuda", Machine("cuda", gpus=2), "cuda:0: a GPU, device=cuda; idle: cuda:1"),
    ("cuda:1", Machine("cuda", gpus=2), "cuda:1: a GPU, device=cuda:1; idle: cuda:0"),
    ("mps", Machine("mps"), "mps: device=mps"),
    ("xpu", Machine("xpu"), "xpu: device=xpu"),
]


@pytest.mark.parametrize(("wanted", "there", "line"), GIVEN)
def test_a_device_that_is_asked_for_is_taken(
    wanted: str, there: Machine, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.stand_in(monkeypatch)
    assert choose_device(wanted, use_cpu=False).line == line


REFUSED = [
    ("cuda", Machine(), "there is no cuda device: this torch is built for the CPU alone"),
    ("cuda", Machine("cuda", there=False), "there is no cuda device: this torch is built for cuda, and finds no such"),
    ("cuda", Machine("cuda", gpus=1, failure=TOO_OLD), "CUDA does not start: The NVIDIA driver"),
    ("cuda:2", Machine("cuda", gpus=2), "there is no cuda:2; this process sees cuda:0, cuda:1"),
    ("mps", Machine("cuda", gpus=1), "there is no mps device: this machine has cuda"),
    ("cuda", Machine("mps"), "there is no cuda device: training on mps is untested"),
    ("xpu", Machine(), "there is no xpu device"),
]


@pytest.mark.parametrize(("wanted", "there", "message"), REFUSED)
def test_a_device_that_is_not_there_is_refused(
    wanted: str, there: Machine, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.stand_in(monkeypatch)
    with pytest.raises(UserError) as error:
        choose_device(wanted, use_cpu=False)
    assert message in str(error.value)


def test_use_cpu_is_the_cpu_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine("cuda", gpus=1).stand_in(monkeypatch)
    assert choose_device("auto", use_cpu=True).line == "cpu: trainer.use_cpu=true"


PRECISIONS = [
    ((9, 0), "bfloat16"),
    ((8, 0), "bfloat16"),
    ((7, 5), "float16"),
    ((7, 0), "float16"),
    ((6, 1), "float16"),
]


@pytest.mark.parametrize(("capability", "dtype"), PRECISIONS)
def test_a_gpu_without_bf16_trains_in_fp16(
    capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine("cuda", gpus=1, capability=capability).stand_in(monkeypatch)
    chosen = choose_precision(validate(composed(["tracker=none"])).trainer, CUDA)
    assert chosen.dtype == dtype


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_an_untried_device_trains_in_fp32(device: str) -> None:
    assert choose_precision(validate(composed(["tracker=none"])).trainer, torch.device(device)).dtype == "float32"


@pytest.mark.parametrize(("capability", "suits"), [((9, 0), True), ((8, 6), True), ((7, 5), False), ((7, 0), False)])
def test_the_attention_kernel_is_for_gpus_that_have_it(
    capability: tuple[int, int], suits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine("cuda", gpus=1, capability=capability).stand_in(monkeypatch)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    query = type("Query", (), {"device": CUDA, "dtype": torch.float16})()
    assert flex.suits(query) == suits


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "emulates"),
    [
        (CUDA, torch.bfloat16, (7, 5), True),
        (CUDA, torch.bfloat16, (8, 0), False),
        (CUDA, torch.float16, (7, 5), False),
        (CUDA, torch.float32, (7, 5), False),
        (CPU, torch.bfloat16, (7, 5), False),
    ],
)
def test_an_emulated_dtype_is_left_to_the_libraries(
    device: Any, dtype: Any, capability: tuple[int, int], emulates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine("cuda", gpus=1, capability=capability).stand_in(monkeypatch)
    forward = object.__new__(PackedForward)
    forward.base = type("Base", (), {"device": device, "dtype": dtype})()
    assert forward._emulates() == emulates


def test_a_trainer_uses_one_of_several_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As transformers counts them; TRL refuses a trainer that would use more."""
    from trl import SFTConfig

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    args._n_gpu = 2
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    on_one_device(args, torch.device("cuda", 1))
    assert args.n_gpu == 1
    assert args.device == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    assert args.train_batch_size == args.per_device_train_batch_size


def test_a_run_on_a_cpu_asks_cuda_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start CUDA on a machine with a GPU, or fail on one without."""
    for name in ("reset_peak_memory_stats", "max_memory_allocated", "mem_get_info", "empty_cache", "get_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA was asked"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    machine.reset_peak_memory(CPU)
    assert machine.peak_memory_bytes(CPU) > 0
    assert machine.free_memory_bytes(CPU) > 0
    assert machine.device_facts(CPU)["type"] == "cpu"
    machine.release_memory()
    _random_states()


RANKS = [
    {"WORLD_SIZE": "2", "RANK": "0"},
    {"WORLD_SIZE": "16", "RANK": "0", "LOCAL_RANK": "0"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    {"PMI_SIZE": "4", "PMI_RANK": "0"},
    {"WORLD_SIZE": "1", "RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
]


def command(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_exp", *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: " ".join(ranks))
@pytest.mark.parametrize("words", [["trainer=cpu"], ["-m", "recipe=dpo", "recipe.beta=0.1,0.2"], ["dry_run=true"]])
def test_several_processes_are_refused_with_one_message(
    tmp_path: Path, ranks: dict[str, str], words: list[str]
) -> None:
    ended = command(tmp_path, *words, **ranks)
    assert ended.returncode == 2
    assert ended.stderr.count("error:") == 1
    assert "several processes cannot train one run yet" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_leave_the_word_to_the_first(tmp_path: Path) -> None:
    """torchrun ends all processes when one has ended, so they wait for it."""
    started = time.monotonic()
    ended = command(tmp_path, "trainer=cpu", WORLD_SIZE="2", RANK="1")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "")
    assert time.monotonic() - started > 4


def test_a_world_of_one_is_no_world(tmp_path: Path) -> None:
    ended = command(tmp_path, "trainer.max_step=1", WORLD_SIZE="1", RANK="0")
    assert "did you mean trainer.max_steps?" in ended.stderr


def test_a_run_on_a_cpu_hides_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `is_available()` says yes by NVML, and torch's optimisers start CUDA, which may fail."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    hide_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    hide_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1", "another job of this process has the GPU"


def test_a_system_that_counts_no_peak_has_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_bytes("Name:\tprozeß\nVmRSS:\t5 kB\n".encode("latin-1"))
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.peak_memory_bytes(CPU) > 2**20
