"""Make runs through the corridor, and load what they left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from lora_exp.config import CONF_DIR
from lora_exp.reports.results import RunResults, read_results
from lora_exp.resolvers import register_resolvers


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended, with what it was made of."""

    objective: float | None
    results: RunResults
    overrides: list[str]

    @property
    def folder(self) -> Path:
        return self.results.folder


Finished = Callable[..., FinishedRun]
"""A function that runs some overrides, once for each set of them in a session."""


GROUPS = {folder.name for folder in CONF_DIR.iterdir() if folder.is_dir()}


def composed(overrides: list[str]) -> DictConfig:
    """Compose a config; the part that the choices of options decide is composed once a process."""
    values = [each for each in overrides if each.lstrip("+").partition("=")[0] not in GROUPS]
    config = copy.deepcopy(_chosen(tuple(each for each in overrides if each not in values)))
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), config)
    return config


@cache
def _chosen(choices: tuple[str, ...]) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3", job_name="lora_exp"):
        return compose("config", list(choices))


def run_in(folder: Path, overrides: list[str]) -> FinishedRun:
    from lora_exp.run import Launch, run

    objective = run(composed([*overrides, f"output_dir={folder}"]), Launch(folder, {"recipe": "", "model": "tiny"}))
    return FinishedRun(objective, read_results(folder), overrides)


def config_of(folder: Path) -> Any:
    from lora_exp.validation import validate

    loaded = OmegaConf.load(folder / "config.yaml")
    assert isinstance(loaded, DictConfig)
    return validate(loaded)


def device_of(config: Any) -> Any:
    """Return the torch device that a run of this config trains on."""
    from lora_exp.process.device import choose_device

    return choose_device(config.device, config.trainer.use_cpu).torch


def load_policy(folder: Path, adapter: str | None = None) -> tuple[Any, Any]:
    """Return policy and tokenizer of a run folder's config, starting from `adapter`."""
    from lora_exp.models import policy as room
    from lora_exp.models.source import adapter_dir, model_files

    config = config_of(folder)
    config = config.model_copy(update={"model": config.model.model_copy(update={"adapter": adapter})})
    with model_files(config.model) as files:
        policy = room.load_policy(config, files, adapter_dir(config.model), folder, device_of(config))
        return policy, room.load_tokenizer(config.model, files)


def tokenized(overrides: list[str]) -> tuple[Any, Any, str]:
    """Return the config, the token ids and the model's folder of a run, by the corridor's own steps."""
    from lora_exp.data.load import load_splits
    from lora_exp.models.source import locate
    from lora_exp.preparation import tokenize
    from lora_exp.run_folder import RunFolder
    from lora_exp.validation import validate

    config = validate(composed(overrides))
    files = locate(config.model)
    splits = load_splits(config.data, config.recipe.row_kind)
    return config, tokenize(config, RunFolder(Path(config.output_dir)), splits, files), files


def build_trainer(folder: Path, overrides: list[str]) -> Any:
    """Return the trainer that a run of these overrides would train, by the corridor's own steps."""
    from lora_exp import preparation
    from lora_exp.data.load import load_splits
    from lora_exp.models.source import adapter_dir
    from lora_exp.run_folder import RunFolder
    from lora_exp.tracking.base import Guarded
    from lora_exp.validation import validate

    config = validate(composed([*overrides, f"output_dir={folder}"]))
    folder.mkdir(parents=True, exist_ok=True)
    run_folder = RunFolder(folder)
    splits = load_splits(config.data, config.recipe.row_kind)
    prepared = preparation.prepare_training(config, run_folder, splits, adapter_dir(config.model), device_of(config))
    return preparation.build_trainer(config, run_folder, prepared, Guarded(None, "none"))
