"""What the YAML files compute with."""

from __future__ import annotations

from omegaconf import OmegaConf

from lora_exp.config import CONF_DIR
from lora_exp.help_page import help_page
from lora_exp.sweeps.names import trial_name


def register_resolvers() -> None:
    """Register them.

    `${half:n}`, `${coalesce:a,b}` (the first that is not null), `${trial_name:overrides,axes,variant}` (a trial's
    folder), `${help_page:}` (the text of `--help`).
    """
    # A wrong type is told where it stands, not where it is computed with.
    OmegaConf.register_new_resolver("half", lambda n: n // 2 if isinstance(n, int) else None, replace=True)
    OmegaConf.register_new_resolver(
        "coalesce", lambda *values: next((value for value in values if value is not None), None), replace=True
    )
    OmegaConf.register_new_resolver("trial_name", trial_name, replace=True)
    OmegaConf.register_new_resolver("help_page", lambda: help_page(CONF_DIR), replace=True)
