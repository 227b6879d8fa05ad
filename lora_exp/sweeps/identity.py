"""What makes two trials the same: everything in their config that can change a result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lora_exp.rules import flatten

WITHOUT_EFFECT = (
    "data.cache_size",
    "data.max_cut_share",
    "data.max_dropped_share",
    "data.on_leak",
    "direction",
    "dry_run",
    "hydra",
    "output_dir",
    "resume",
    "store",
    "sweep",
    "tracker",
    "trainer.auto_find_batch_size",
    "trainer.grace_seconds",
    "trainer.logging_first_step",
    "trainer.logging_steps",
)
"""Keys, and groups of keys, that say where results go, who watches and what stops a run before it starts."""


def lies_under(key: str, groups: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of `groups` or inside one."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def with_effect(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config that can change a result, by dotted key."""
    return {
        key: value
        for key, value in flatten(config).items()
        if not isinstance(value, Mapping) and not lies_under(key, WITHOUT_EFFECT)
    }


def identity_of(resolved: Mapping[str, Any]) -> str:
    """Return the name of a trial's question: 16 hexadecimal digits of the SHA-256 of its resolved config."""
    text = json.dumps(with_effect(resolved), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
