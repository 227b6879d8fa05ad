"""The base, loaded once a process: the jobs of a multirun share its weights where nothing about it changed.

Each job gets a copy of the model's modules that points at the same weights, so that what libraries do to modules
(hooks, replaced layers and forwards, switched-off dropout) stays in the job. The weights are checked after each job.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from lora_exp.config import ModelConfig, QuantConfig


@dataclass(frozen=True)
class _Kept:
    key: str
    base: Any
    checksum: str


class SharedBase:
    """One base, kept for the next job that wants the same."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def get(self, key: str, load: Callable[[], Any]) -> Any:
        """Return a copy of the base that shares its weights, loading it if the kept one is another.

        Args:
            key: From `base_key`.
            load: Loads it.
        """
        if self._kept is None or self._kept.key != key:
            self._kept = None  # before loading: two bases may not fit
            base = load()
            self._kept = _Kept(key, base, checksum(base))
        return copy_sharing_weights(self._kept.base)

    @property
    def digest(self) -> str:
        """The checksum of the kept base.

        Raises:
            ValueError: If none is kept.
        """
        if self._kept is None:
            raise ValueError("no base is kept")
        return self._kept.checksum

    def untouched(self) -> bool:
        """Whether the kept weights are bitwise what was loaded; if not, they are forgotten."""
        if self._kept is None or checksum(self._kept.base) == self._kept.checksum:
            return True
        self._kept = None
        return False

    def forget(self) -> None:
        """Let go of the base."""
        self._kept = None


SHARED_BASE = SharedBase()


def base_key(config: ModelConfig, quant: QuantConfig, dtype: str, device: Any, files: str) -> str:
    """Return what makes two loaded bases the same: where from, in which format, on which device.

    Files in a folder count with their size and time of change, so that new weights under an old name are loaded.
    """
    folder = Path(files)
    states = []
    if config.embedded is None and folder.is_dir():
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    parts = [
        config.model_dump(exclude={"adapter", "fetch"}),
        quant.model_dump(by_alias=True),
        dtype,
        str(device),
        states,
    ]
    return json.dumps(parts, sort_keys=True, default=str)


def copy_sharing_weights(base: Any) -> Any:
    """Return a copy of a model whose parameters are new objects over the same memory."""
    memo: dict[int, Any] = {id(parameter): _alias(parameter) for parameter in base.parameters()}
    return copy.deepcopy(base, memo)


def _alias(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return a parameter of the same class, with the same attributes (bitsandbytes keeps its scales there)."""
    alias = torch.Tensor._make_subclass(type(parameter), parameter.data, parameter.requires_grad)
    alias.__dict__.update(parameter.__dict__)
    return alias


def checksum(base: Any) -> str:
    """Return a digest of the model's tensors, bit for bit (xxh3, which runs at the memory's speed)."""
    digest = xxhash.xxh3_128()
    for tensor in _tensors(base):
        # numpy has no bf16; every format's bits can be seen as bytes.
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _tensors(base: Any) -> Iterator[torch.Tensor]:
    for parameter in base.parameters():
        yield parameter.data
        quant_state = getattr(parameter, "quant_state", None)
        held = {**vars(parameter), **(vars(quant_state) if quant_state is not None else {})}
        yield from (value for value in held.values() if isinstance(value, torch.Tensor))
