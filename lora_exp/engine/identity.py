"""What computed a reference log-probability: base weights, quantisation, dtype, start adapter, engine, libraries.

Nothing else is in it, so a sweep over beta, learning rate, rank, seed or loss type finds what its first run computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.config import Config
from lora_exp.engine.base import Engine
from lora_exp.engine.store import StoredModel
from lora_exp.errors import count
from lora_exp.models.policy import Policy
from lora_exp.provenance import versions

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")

LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft")
"""Their versions are part of every identity: each computes a part of the forward pass, and may round otherwise."""

ARITHMETIC = 5
"""Counted up when the packed forward pass comes to compute other numbers, so that those kept before are not taken for
its own. 2: 8-bit layers compute as in training. 4: norms sum their squares in float32 under autocast.
5: 8-bit layers multiply in the compute dtype on every device."""

FileDigest = Callable[[Path], str]


@dataclass(frozen=True)
class Identity:
    """A reference model's name in the store, and what it is made of, for people."""

    digest: str
    description: dict[str, Any]


def reference_identity(config: Config, engine: Engine, policy: Policy, files: str, file_digest: FileDigest) -> Identity:
    """Return the identity of the model that a run's reference log-probabilities come from.

    Args:
        config: The run.
        engine: What computes it, which may be other than the config asked for.
        policy: What is trained; its reference is part of it.
        files: What the base was read from: a folder or a hub id.
        file_digest: Digests a file, without reading it again if it can tell that it is unchanged.
    """
    base = policy.model.get_base_model()
    parts = {
        "weights": _weights(files, base.config, file_digest),
        "quant": config.quant.model_dump(exclude_unset=True, by_alias=True),
        "dtype": str(base.dtype).removeprefix("torch."),
        "compute": policy.precision.dtype,
        "adapter": _adapter(policy, file_digest),
        "engine": f"{engine.name} on {policy.device.type}",
        "arithmetic": ARITHMETIC,
        "versions": library_versions(),
    }
    digest = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
    shown = {
        "model": config.model.pretrained_model_name_or_path,
        "quant": _bits(config),
        "dtype": parts["dtype"],
        "adapter": "none" if policy.start is None else str(config.model.adapter or policy.start.name),
        "engine": parts["engine"],
        "versions": parts["versions"],
    }
    return Identity(digest, shown)


def library_versions() -> dict[str, str | None]:
    """Return the versions of the libraries that compute reference log-probabilities."""
    found = versions()
    return {name: found.get(name) for name in LIBRARIES}


def rows_not_read(identity: Identity, stored: Sequence[StoredModel]) -> str | None:
    """Return why a run does not read the rows of its own reference model, or None.

    Args:
        identity: The run's reference model.
        stored: What the store holds. Rows under another identity, but with the description of this one, are of
            other versions of the libraries.
    """
    if any(model.identity == identity.digest for model in stored):
        return None
    others = [model for model in stored if _same_but_for_versions(model.description, identity.description)]
    reasons = {_reason(model.versions, identity.description["versions"]): None for model in others}
    if not reasons:
        return None
    rows = count(sum(model.rows for model in others), "stored row")
    return f"this run does not read {rows} of its reference model: {'; '.join(reasons)}"


def _same_but_for_versions(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first | {"versions": None} == second | {"versions": None} and first.get("versions") != second["versions"]


def _reason(then: dict[str, str], now: dict[str, str | None]) -> str:
    if not then:
        return "an earlier lora_exp stored them without the versions of the libraries"
    changes = [f"{name} {then.get(name)}, now {version}" for name, version in now.items() if then.get(name) != version]
    return f"computed with {', '.join(changes)}"


def _weights(files: str, config: Any, file_digest: FileDigest) -> dict[str, str]:
    """Return a digest by file name; of a model on the hub its commit says the same."""
    folder = Path(files)
    if not folder.is_dir():
        return {files: str(config._commit_hash)}
    found = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    return {path.name: file_digest(path) for path in [*found, folder / "config.json"]}


def _adapter(policy: Policy, file_digest: FileDigest) -> dict[str, str] | None:
    if policy.start is None:
        return None
    names = ("adapter_model.safetensors", "adapter_config.json")
    return {name: file_digest(policy.start / name) for name in names if (policy.start / name).is_file()}


def _bits(config: Config) -> str:
    if config.quant.load_in_4bit:
        return f"4bit {config.quant.bnb_4bit_quant_type}"
    return "8bit" if config.quant.load_in_8bit else "none"
