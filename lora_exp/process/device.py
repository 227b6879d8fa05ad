"""The device that a run trains on, chosen once by what is there, and what that device can do.

CUDA on several GPUs, MPS and XPU never ran here: their branches are tested with stand-ins for torch's answers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lora_exp.errors import Problem, UserError

UNTRIED = ("mps", "xpu")
"""Kinds of device that `auto` leaves alone."""

OWN_MEMORY = ("cuda", "xpu")
"""Kinds of device with memory of their own, and a torch module that counts it."""

BF16_CAPABILITY = (8, 0)
"""The CUDA compute capability from which a GPU multiplies bf16 itself, and from which Triton's attention works."""

TITLE = "this machine cannot train so"


@dataclass(frozen=True)
class Device:
    """Where a run trains.

    Args:
        torch: The `torch.device`, with its index where there may be several.
        reason: Why this one.
        idle: Other GPUs that this process sees and does not use.
    """

    torch: Any
    reason: str
    idle: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """What a run prints of it."""
        idle = f"; idle: {', '.join(self.idle)}" if self.idle else ""
        return f"{self.torch}: {self.reason}{idle}"


def choose_device(wanted: str, use_cpu: bool) -> Device:
    """Return the device that a run trains on.

    Args:
        wanted: The config's `device`.
        use_cpu: The config's `trainer.use_cpu`.

    Raises:
        UserError: If the wanted device is not there, or cannot be used.
    """
    import torch

    if wanted == "cpu" or use_cpu:
        return Device(torch.device("cpu"), "device=cpu" if wanted == "cpu" else "trainer.use_cpu=true")
    kind, _, index = wanted.partition(":")
    built = torch.accelerator.current_accelerator()
    found = torch.accelerator.current_accelerator(check_available=True)
    if wanted == "auto":
        return _best(built, found)
    if found is None or found.type != kind:
        raise UserError(
            TITLE, [Problem("device", f"there is no {kind} device: {_why_cpu(built, found)}", "device=auto")]
        )
    if kind != "cuda":
        return Device(torch.device(kind), f"device={wanted}")
    if failure := _cuda_failure():
        raise UserError(TITLE, [Problem("device", f"CUDA does not start: {failure}", "device=cpu")])
    return _gpu(int(index or 0), f"device={wanted}")


def _best(built: Any, found: Any) -> Device:
    """Return CUDA's first GPU where CUDA works, else the CPU."""
    import torch

    cpu = torch.device("cpu")
    if found is None or found.type != "cuda":
        return Device(cpu, _why_cpu(built, found))
    if failure := _cuda_failure():
        return Device(cpu, f"CUDA does not start: {failure}")
    return _gpu(0, "")


def _why_cpu(built: Any, found: Any) -> str:
    if found is not None and found.type in UNTRIED:
        return f"training on {found.type} is untested; device={found.type} tries it"
    if found is not None:
        return f"this machine has {found.type}"
    if built is not None:
        return f"this torch is built for {built.type}, and finds no such device"
    return "this torch is built for the CPU alone"


def _cuda_failure() -> str | None:
    """Start CUDA in this process; return the reason where it fails, such as a driver that is too old."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None if torch.cuda.device_count() else "it shows no GPU"


def _gpu(index: int, reason: str) -> Device:
    import torch

    number = torch.cuda.device_count()
    if index >= number:
        what = f"there is no cuda:{index}; this process sees {', '.join(_gpus(number))}"
        raise UserError(TITLE, [Problem("device", what, "device=cuda takes the first one")])
    reason = reason or (f"the first of {number} GPUs" if number > 1 else "the GPU of this machine")
    idle = tuple(each for each in _gpus(number) if each != f"cuda:{index}")
    return Device(torch.device("cuda", index), f"{torch.cuda.get_device_name(index)}, {reason}", idle)


def hide_gpus() -> None:
    """Have CUDA show no GPU to this job, which trains on the CPU, unless CUDA has started in this process.

    torch's optimisers ask the accelerator for its stream in every step where one is available, which would start CUDA,
    or fail where it cannot start.
    """
    import torch

    if not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _gpus(number: int) -> list[str]:
    return [f"cuda:{index}" for index in range(number)]


def computes_bf16(device: Any) -> bool:
    """Whether a device multiplies bf16 itself; elsewhere torch emulates it, more slowly than float32."""
    import torch

    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_tile", "bf16"))
    if device.type != "cuda":
        return False
    # ROCm counts capabilities otherwise; each GPU that it supports has bf16.
    return bool(torch.version.hip) or bool(torch.cuda.get_device_capability(device) >= BF16_CAPABILITY)


def own_memory(device: Any) -> Any | None:
    """Return the torch module that counts a device's memory, such as `torch.cuda`; None where it uses the host's."""
    import torch

    return torch.get_device_module(device) if device.type in OWN_MEMORY else None
