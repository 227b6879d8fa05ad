"""Keeps from the terminal what libraries say and a user cannot act on. Warnings that can be acted on stay."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import warnings
from contextlib import redirect_stdout

UNUSABLE_WARNINGS = (
    r".*MatMul8bitLt: inputs will be cast.*",  # bitsandbytes: how its 8-bit product works
    r".*'pin_memory' argument is set as true but no accelerator.*",  # torch: a default of its DataLoader
    r".*`use_cache=True` is incompatible with gradient checkpointing.*",  # transformers turns it off itself
    r".*`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated.*",  # transformers 5.23; TRL 1.16 uses it
    r".*_check_is_size will be removed in a future PyTorch release.*",  # bitsandbytes calling torch
)
PROGRESS_BARS = {"transformers.utils.logging"}
CHATTY_LOGGERS = ("bitsandbytes", "accelerate", "datasets", "httpx", "torch.distributed", "peft")


def quiet_libraries() -> None:
    """Set the log levels, warning filters and progress bars of the libraries. Imports none of them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    for message in UNUSABLE_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in PROGRESS_BARS & sys.modules.keys():  # imported already, so the environment says nothing to them
        sys.modules[name].disable_progress_bar()
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def import_quietly(module: str) -> None:
    """Import a library module that prints lines as it is imported."""
    with redirect_stdout(io.StringIO()):
        importlib.import_module(module)
