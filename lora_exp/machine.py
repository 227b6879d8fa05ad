"""What this process uses of the machine: memory, device, and state that libraries keep in the process."""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROC = Path("/proc/self")


def reset_peak_memory() -> None:
    """Start the peak counters anew, so that a job of a multirun reports its own peak."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        # Linux: 5 resets the high-water mark of resident memory (man 5 proc, clear_refs).
        (PROC / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # no Linux, or not allowed: the peak is the process's


def peak_memory_bytes(device: Any) -> int:
    """Return the most memory that was in use since `reset_peak_memory`: the GPU's, or this process's."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = (PROC / "status").read_text(encoding="ascii")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def device_facts(device: Any) -> dict[str, Any]:
    """Return what `run.json` says of the device."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


@contextmanager
def isolated_job() -> Iterator[None]:
    """Leave nothing of a job behind for the next one of the process: environment, library state, memory."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if "accelerate" in sys.modules:
            # accelerate keeps precision and device in process-wide singletons that the next Trainer would
            # inherit; read in accelerate 1.15, `accelerate/state.py`.
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        gc.collect()
        if "torch" in sys.modules:
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()
