"""What is secret, and how it is masked.

A secret is known by its name (`HF_TOKEN`, `trainer.hub_token`), by its place (`https://me:password@host`) or by its
shape (`hf_...`). One of the environment is masked as `${oc.env:NAME}`, so that a config that took it from there is read
back as what it was; any other as `***`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.secrets.home import hub_token, netrc_passwords
from lora_exp.text import visible

MASK = "***"
SHORTEST = 8
"""Characters of a secret at least: shorter values are ordinary words and numbers too often."""

NAME = re.compile(
    r"(?:password|passwd|passphrase|secret|token|api_?key|connection_string)$|(?:^|_)(?:key|pass|auth|credentials?)$",
    re.IGNORECASE,
)
"""How the name of a secret ends: `HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`, `PGPASSWORD`, `hub_token`."""

SPECIAL_TOKEN = re.compile(
    r"^(?:bos|eos|unk|sep|pad|cls|mask|boi|eoi|boa|eoa|image|audio|video|\w*special)_token$", re.IGNORECASE
)
"""Names of a tokenizer's special tokens, which are no secrets."""

SHAPES = re.compile(
    r"""
    (?<=://)(?P<user>[^\s/@:]*:)[^\s/@]+(?=@)                                         # https://user:password@host
    | (?P<parameter>[?&](?:access_token|token|api_?key|key|secret|password|sig|signature|x-amz-signature
        |x-amz-security-token)=)[^\s&"'<>#]+                                          # ?token=...
    | (?P<header>\bauthorization["']?\s*[:=]\s*["']?(?:bearer\s|basic\s|token\s)?\s*)[^\s"',]+
    | (?P<bearer>\bbearer\s+)[\w.~+/=-]{16,}
    | \b(?:hf|api_org)_[A-Za-z0-9]{16,}                                               # Hugging Face
    | \bwandb_v\d_\w{16,}                                                             # Weights & Biases
    | \b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,})            # GitHub, GitLab
    | \bsk-(?=[\w-]*\d)[\w-]{20,}                                                     # OpenAI, Anthropic
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                                                   # Amazon
    | \bxox[abeprs]-[\w-]{10,}                                                        # Slack
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----[^-]+(?:-----END\ [A-Z ]*PRIVATE\ KEY-----)?
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""What is secret whatever it is called; a named group before it stays."""

FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)\s*\}")
"""OmegaConf's way of writing a variable of the environment, without a default."""

INTERPOLATION = re.compile(r"(\\*)(\$\{oc\.env:\w+\}|\$\{)")
"""What OmegaConf would resolve, and the backslashes before it, of which it takes two for one."""


def is_secret_name(name: str) -> bool:
    """Whether a variable of the environment, or a key of the config, holds a secret by its name."""
    return NAME.search(name) is not None and SPECIAL_TOKEN.search(name) is None


def masked(value: Any) -> Any:
    """Return a value with the secrets in all its strings masked; the keys of mappings stay."""
    return _masked(value, {**_stored(), **environment_secrets()})


def masked_config(composed: DictConfig) -> DictConfig:
    """Return a config with every interpolation resolved but those that bring a secret; read back, it is the same."""
    resolved = masked(OmegaConf.to_container(composed, resolve=True))
    written = OmegaConf.create(_escaped(resolved, set(environment_secrets().values())))
    assert isinstance(written, DictConfig)
    return written


def _escaped(value: Any, masks: Collection[str]) -> Any:
    """Write `${` that means itself, in a chat template say, as OmegaConf reads it back; masks stay interpolations."""
    if isinstance(value, str):
        return INTERPOLATION.sub(
            lambda found: found[1] * 2 + ("" if found[2] in masks else "\\") + found[2],
            value,
        )
    if isinstance(value, Mapping):
        return {key: _escaped(item, masks) for key, item in value.items()}
    return [_escaped(item, masks) for item in value] if isinstance(value, list) else value


def safe(text: str) -> str:
    """Return text for a terminal or a log: secrets masked, control characters made visible."""
    return visible(str(masked(text)))


def _masked(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        # The longest first, as one may hold another; all in one pass, as one may stand in another's mask.
        ordered = sorted((each for each in known if each in value), key=len, reverse=True)
        if ordered:
            value = re.sub("|".join(map(re.escape, ordered)), lambda found: known[found[0]], value)
        return SHAPES.sub(_mask, value)
    if isinstance(value, Mapping):
        return {key: _masked(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item, known) for item in value]
    return value


def _mask(found: re.Match[str]) -> str:
    kept = next((group for group in found.groups() if group is not None), "")
    return found[0] if FROM_ENVIRONMENT.fullmatch(found[0], len(kept)) else f"{kept}{MASK}"


def environment_secrets() -> dict[str, str]:
    """Return the secrets of the environment, and how each is written in a config."""
    return {value: f"${{oc.env:{name}}}" for name, value in os.environ.items() if _is_secret(name, value)}


def _is_secret(name: str, value: str) -> bool:
    if len(value) < SHORTEST or value.startswith(("/", "~/", "./")):  # the name of a file that holds one
        return False
    return is_secret_name(name) or SHAPES.search(value) is not None


@lru_cache(maxsize=1)
def _stored() -> dict[str, str]:
    """Return the secrets that libraries find in the home folder: netrc's passwords and the hub's token."""
    found = [*netrc_passwords().values(), hub_token()]
    return {secret: MASK for secret in found if len(secret) >= SHORTEST}


class MaskingFormatter(logging.Formatter):
    """Formats log records without secrets and control characters; conf/hydra/job_logging names it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the traceback where the record has one."""
        return safe(super().format(record))
