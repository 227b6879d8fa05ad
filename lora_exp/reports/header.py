"""What a run was composed of, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_exp.config import Config
from lora_exp.reports.page import REMOTE_CODE


def header_lines(
    config: Config, choices: Mapping[str, str], last: Sequence[tuple[str, str]] = (), trial: str | None = None
) -> list[tuple[str, str]]:
    """Return what a run was composed of, a name and a line each.

    Args:
        config: The run.
        choices: The option taken from each config group.
        last: What else there is to say.
        trial: The name of the trial, in a multirun.
    """
    model = config.model.pretrained_model_name_or_path
    adapter = f", going on from {config.model.adapter}" if config.model.adapter else ""
    lora, recipe = config.lora, config.recipe
    return [
        *([("trial", trial)] if trial else []),
        ("recipe", f"{recipe.name}, max_length {recipe.max_length}, prompts {recipe.max_prompt_length}"),
        ("model", f"{choices.get('model', '')} ({model}){adapter}".strip()),
        *([("code", REMOTE_CODE)] if config.model.trust_remote_code else []),
        ("quant", choices.get("quant", "") or config.quant.target or "none"),
        (
            "lora",
            f"{choices.get('lora', '')} r={lora.r} alpha={lora.lora_alpha:g} dropout={lora.lora_dropout:g}".strip(),
        ),
        *last,
    ]
