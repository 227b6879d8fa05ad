"""What this process uses of the machine: memory, device, and state that libraries keep in the process."""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.allocator import allocator_name, collect
from lora_exp.errors import Problem, UserError
from lora_exp.process.device import own_memory

KERNELS = 384
"""Compiled products that are kept. The layers of a model repeat those of a micro-batch, which must all find room: up to
310 where its 1,024 tokens are rows of as many lengths as possible."""

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "bad_alloc", "bad allocation")
"""In the errors of CUDA, of torch's processor allocator (a plain RuntimeError), of the system and of C++."""
NO_FRAME = "error return without exception set"
"""In the SystemError of CPython 3.11 where a call finds no memory for its frame: `ceval.c` leaves with no exception."""

PROC = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")


def reset_peak_memory(device: Any) -> None:
    """Start the peak counters anew, so that a job of a multirun reports its own peak."""
    if own := own_memory(device):
        own.reset_peak_memory_stats(device)
    try:
        # Linux: 5 resets the high-water mark of resident memory (man 5 proc, clear_refs).
        (PROC / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # no Linux, or not allowed: the peak is the process's


def peak_memory_bytes(device: Any) -> int:
    """Return the most memory that was in use since `reset_peak_memory`: the GPU's, or this process's."""
    if own := own_memory(device):
        return int(own.max_memory_allocated(device))
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    try:
        lines = (PROC / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    counted = next((line.split()[1] for line in lines if line.startswith("VmHWM")), None)
    if counted is not None:
        return int(counted) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # no Linux, or one that does not count it
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory, of the device or of the process."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, SystemError):
        return str(error) == NO_FRAME
    return isinstance(error, RuntimeError | OSError) and any(mark in str(error) for mark in OUT_OF_MEMORY)


def free_memory_bytes(device: Any) -> int:
    """Return what the device, or this process's container, has left."""
    import psutil

    if own := own_memory(device):
        return int(own.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    limit, used = (_cgroup_bytes(name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return available
    return max(0, min(available, limit - used + _cgroup_file_cache()))


def _cgroup_bytes(name: str) -> int | None:
    """Read a number of this process's control group (version 2); None where there is none, or no limit."""
    try:
        text = (CGROUP / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cgroup_file_cache() -> int:
    """Return what files that were read take of this process's control group: the system gives it back when asked."""
    try:
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed instead of giving it back to the system; False where malloc is not glibc's.

    torch allocates each temporary of a training step anew on a processor. glibc maps blocks over 32 MiB from the
    system and unmaps them when freed, so every step would fault its gigabytes in again, a third of its time.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # malloc.h: M_MMAP_THRESHOLD is -3, its value at most what an int holds; M_TRIM_THRESHOLD is -1, and -1 never trims.
    return bool(mallopt(-3, 2**30)) and bool(mallopt(-1, -1))


def bound_kernel_caches() -> None:
    """Keep fewer compiled products of a processor, before torch computes its first; a value that is set stays.

    oneDNN compiles a product in half precision anew for each shape that it meets and keeps 1,024 of them, torch as many
    beside it, about 1 MiB each: rows of many lengths would fill 1 GiB and more.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


def return_freed_memory() -> None:
    """Give what malloc keeps back to the system."""
    import ctypes

    if collect():
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # no glibc: it was not kept


def release_memory() -> None:
    """Give back all that nothing refers to any more, of the process and of the device."""
    gc.collect()
    return_freed_memory()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def device_facts(device: Any) -> dict[str, Any]:
    """Return what `run.json` says of the device."""
    import torch

    own = own_memory(device)
    name = own.get_device_name(device) if own else _processor()
    return {"type": device.type, "name": name, "threads": torch.get_num_threads(), "allocator": allocator_name()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def ask_for_determinism(seed: int) -> str:
    """Have torch use algorithms that give the same bits each time, until the end of the job, and return what to say."""
    from transformers import enable_full_determinism

    enable_full_determinism(seed)
    return "the same at every repetition on this machine: deterministic=true"


@contextmanager
def told_if_nondeterministic() -> Iterator[None]:
    """Turn torch's refusal of an operation that has no deterministic algorithm into an error with its mend."""
    try:
        yield
    except RuntimeError as error:
        if "torch.use_deterministic_algorithms" not in str(error):
            raise
        problem = Problem(
            "deterministic", str(error).partition(",")[0], "engine=padded may do without, or deterministic=false"
        )
        raise UserError("torch cannot compute this run deterministically", [problem]) from error


@dataclass(frozen=True)
class _Determinism:
    """torch's own switches; read in torch 2.13 and transformers 5.23, `trainer_utils.enable_full_determinism`."""

    algorithms: bool = False
    warn_only: bool = False
    cudnn: bool = False
    benchmark: bool = False

    @classmethod
    def now(cls) -> _Determinism:
        if "torch" not in sys.modules:
            return cls()
        import torch

        warn_only, cudnn = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn
        return cls(torch.are_deterministic_algorithms_enabled(), warn_only, cudnn.deterministic, cudnn.benchmark)

    def restore(self) -> None:
        if self == _Determinism.now():
            return
        import torch

        torch.use_deterministic_algorithms(self.algorithms, warn_only=self.warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self.cudnn, self.benchmark


@contextmanager
def isolated_job() -> Iterator[None]:
    """Leave nothing of a job behind for the next one of the process: environment, library state, memory."""
    environment, determinism = dict(os.environ), _Determinism.now()
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        determinism.restore()
        if "accelerate" in sys.modules:
            # accelerate keeps precision and device in process-wide singletons that the next Trainer would
            # inherit; read in accelerate 1.15, `accelerate/state.py`.
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        release_memory()
