"""Settings that suit the machine: how many tokens at a time, and whether activations must be recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lora_exp.machine import free_memory_bytes
from lora_exp.models.targets import linear_layers

TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens a micro-batch where memory is plenty. A processor's products run at full rate from some hundred rows on; a
GPU wants more. More costs memory and gains nothing."""
LEAST_TOKENS = 256

SAVED_PER_FEATURE = 2.0
"""Numbers that a backward pass keeps for each input and output feature of a linear layer, measured on Llama models
(benchmarks/NOTES.md): the layer's own input, the adapter's, what norm, rotation and activation save."""

SHARE = 0.6
"""Of the free memory that activations may fill; the rest is for the output layer, the optimiser and other programs."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the reason for people."""

    value: Any
    reason: str


def bytes_per_token(model: Any) -> int:
    """Return an estimate of what a backward pass keeps of one token."""
    base = model.get_base_model()
    features = sum(_features(base.get_submodule(name)) for name in linear_layers(base) if "lora_" not in name)
    return int(SAVED_PER_FEATURE * features * base.dtype.itemsize)


def _features(layer: Any) -> int:
    """Return a linear layer's inputs and outputs. Not of its weight's shape, which is flat in 4 bits."""
    if hasattr(layer, "in_features"):
        return int(layer.in_features + layer.out_features)
    return sum(layer.weight.shape)  # transformers' Conv1D names none


def choose_tokens(wanted: int | Literal["auto"], model: Any) -> Choice:
    """Return `engine.tokens_per_microbatch`: as many as use the device fully and fit into its free memory."""
    if wanted != "auto":
        return Choice(wanted, f"engine.tokens_per_microbatch={wanted}")
    device = model.device
    usual = TOKENS.get(device.type, TOKENS["cuda"])
    fitting = int(SHARE * free_memory_bytes(device)) // max(bytes_per_token(model), 1)
    if fitting >= usual:
        return Choice(usual, "more would not be faster")
    return Choice(max(LEAST_TOKENS, fitting), f"what {_size(free_memory_bytes(device))} of free memory hold")


def choose_checkpointing(wanted: bool | Literal["auto"], model: Any, tokens: int) -> Choice:
    """Return `trainer.gradient_checkpointing`: off when the activations of `tokens` fit."""
    if wanted != "auto":
        return Choice(wanted, f"trainer.gradient_checkpointing={str(wanted).lower()}")
    need, free = tokens * bytes_per_token(model), free_memory_bytes(model.device)
    fits = need <= SHARE * free
    return Choice(
        not fits,
        f"{tokens:,} tokens need about {_size(need)} of {_size(free)} free memory"
        if fits
        else f"{tokens:,} tokens would need about {_size(need)}, and {_size(free)} are free",
    )


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
