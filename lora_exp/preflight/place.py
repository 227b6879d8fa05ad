"""Where a run will train, with how much memory, and how it will be computed there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_exp.config import Config
from lora_exp.data.tokenize import SplitReport
from lora_exp.engine.settings import choose_checkpointing
from lora_exp.libraries import load_libraries
from lora_exp.machine import free_memory_bytes
from lora_exp.preflight.calibration import keep_process_bytes, known_process_bytes
from lora_exp.preflight.memory import Memory, Place, Way
from lora_exp.preflight.twin import read_structure
from lora_exp.process.device import own_memory
from lora_exp.provenance import versions

USUAL_PROCESS = 600 * 2**20
"""Python with torch, transformers, TRL and PEFT, before any weights; where this machine has not measured it yet."""

FIRST_STEP = 25 * 2**20
"""What trainer, data loader and the code of a first step take beside it; measured on the embedded model."""

_process: list[int] = []
"""Measured in the first run of this process, before it held any weights."""


def memory_of_this_process(
    config: Config, reports: Mapping[str, SplitReport], files: str, start: Path | None, device: Any
) -> tuple[Memory, Way]:
    """Return the memory of a run that starts here, and how it will be computed.

    Args:
        config: The run.
        reports: What became of its rows, by split.
        files: The model's folder or hub id (from `model_files`).
        start: The folder of the adapter to go on from, if any.
        device: The torch device.
    """
    lengths = {split: report.lengths for split, report in reports.items()}
    memory = Memory(config, read_structure(config, files), start, place_of_this_process(device), lengths)
    return memory, way_of(config, memory)


def place_of_this_process(device: Any) -> Place:
    """Return where a run of this process trains, with all libraries loaded and no weights of its own yet."""
    if own := own_memory(device):
        free = free_memory_bytes(device)
        return Place(device, 0, free + int(own.memory_reserved(device)), free)
    load_libraries()
    resident = _resident()
    if not _process:
        _process.append(resident)
        keep_process_bytes(libraries(), resident)
    free = free_memory_bytes(device)
    return Place(device, _process[0] + FIRST_STEP, free + resident, free)


def place_without_libraries(device: Any) -> Place:
    """Return where a run would train that starts anew, as far as this machine knows it."""
    free = free_memory_bytes(device)
    if own_memory(device):
        return Place(device, 0, free, free)
    process = known_process_bytes(libraries()) or USUAL_PROCESS
    return Place(device, process + FIRST_STEP, free + _resident(), free)


def libraries() -> str:
    """Return what decides how large a process is before it holds weights."""
    return " ".join(f"{name} {number}" for name, number in versions().items() if name != "lora_exp")


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def way_of(config: Config, memory: Memory) -> Way:
    """Return how the run will be computed, as far as it can be known without the weights."""
    wanted = config.trainer.gradient_checkpointing
    engine, _ = config.engine.expected_for(memory.base, config.recipe)
    tokens = engine.choose_tokens(wanted, memory)
    number = tokens.value if tokens else None
    return Way(engine.name, number, choose_checkpointing(wanted, engine.name, number, memory).value)
