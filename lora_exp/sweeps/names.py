"""Trials are named for what they vary: `recipe.beta=0.1,recipe.max_length=256`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

LONGEST = 120
"""Characters of a folder's name; most file systems take 255 bytes."""


def key_of(override: str) -> str:
    """Return the key, or the group, that an override sets."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def trial_name(overrides: Iterable[str], axes: Iterable[str], variant: str | None = None) -> str:
    """Return the name of a trial's folder; two trials of a sweep never share one.

    Args:
        overrides: The trial's own, as Hydra gives them to a job.
        axes: The keys that the sweep varies, in the order in which they are to be read.
        variant: What else sets the trial apart, from a sweep that was extended.
    """
    given = {key_of(override): override.lstrip("+~") for override in overrides}
    parts = [given[axis] for axis in axes if axis in given]
    return safe(",".join([*parts, *([variant] if variant else [])]) or "trial")


def safe(name: str, longest: int = LONGEST) -> str:
    """Return a name that every file system takes; what had to change is told apart by a digest."""
    plain = re.sub(r"[^\w.,=+-]", "_", name)
    if plain == name and len(name) <= longest and name.strip("."):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: longest - 9]}-{digest}"
