"""What a forward and a backward pass keep in memory, counted on a model without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lora_exp.engine.forward import PackedForward
from lora_exp.engine.packing import pack
from lora_exp.models.precision import Precision
from lora_exp.preflight.batches import Examples, flat_row
from lora_exp.preflight.live import LiveBytes
from lora_exp.preflight.twin import Twin, computing
from lora_exp.recipes.divergence import kl_per_token

TRL_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""Numbers a token that TRL asks its output layer for, besides WPO's."""


@dataclass(frozen=True)
class Passes:
    """Bytes beside the weights, their gradients and the optimiser.

    Args:
        kept: Alive when the last hidden states are computed: what the backward pass needs.
        peak: The most that is alive at any moment of both passes.
        products: How many matrix products of different shapes they compute.
        doubt: Why it is a guess; empty where it was counted.
    """

    kept: int
    peak: int
    products: int
    doubt: str = ""


def packed_passes(
    twin: Twin, precision: Precision, examples: Examples, train: bool, checkpointing: bool, common: int = 0
) -> Passes:
    """Return what the packed engine holds for a micro-batch of these lengths.

    Args:
        twin: The model.
        precision: What it computes in.
        examples: Lengths of the micro-batch's examples.
        train: Whether a backward pass follows.
        checkpointing: Whether layers are computed again in it.
        common: Tokens from the start on that the examples' prompts share, and that are computed once.
    """
    row = pack(flat_row(examples, common))
    with twin.mode, LiveBytes([]):  # it compares what some modules compute
        forward = PackedForward(twin.base)
    return _count(twin, precision, lambda: forward.scores(row).log_probs, train, checkpointing)


def padded_passes(twin: Twin, precision: Precision, shape: tuple[int, int], train: bool, checkpointing: bool) -> Passes:
    """Return what TRL's own forward holds for a padded batch.

    Args:
        twin: The model.
        precision: What it computes in.
        shape: Rows and columns of the batch.
        train: Whether a backward pass follows.
        checkpointing: Whether layers are computed again in it.
    """
    from trl.trainer.utils import add_fused_lm_head

    from lora_exp.recipes.trl import touched_tiles

    ids = torch.zeros(shape, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}

    def compute() -> torch.Tensor:
        return twin.model(**inputs, fused_lm_head=True).log_probs

    add_fused_lm_head(twin.base, outputs=TRL_OUTPUTS)
    try:
        itemsize = getattr(torch, precision.dtype).itemsize
        with touched_tiles(twin.base.get_output_embeddings().weight.shape[0], itemsize):
            return _count(twin, precision, compute, train, checkpointing)
    finally:
        del twin.base.forward


def divergence_passes(twin: Twin, precision: Precision, prompt: int, answer: int) -> Passes:
    """Return what the divergence from the reference holds for a row of these lengths."""
    row = {"prompt_ids": [0] * prompt, "chosen_ids": [0] * answer}

    def compute() -> torch.Tensor:
        return torch.tensor(kl_per_token(twin.base, nullcontext, [row]))

    return _count(twin, precision, compute, train=False, checkpointing=False)


def _count(
    twin: Twin, precision: Precision, compute: Callable[[], torch.Tensor], train: bool, checkpointing: bool
) -> Passes:
    """Count while scores are computed and, in training, sent back."""
    twin.model.train(train)
    with _gradients(twin) as gradients, _checkpointed(twin, train and checkpointing), _inputs_kept(twin):
        before = [*twin.model.parameters(), *twin.model.buffers(), *gradients]
        with computing(twin, precision), torch.set_grad_enabled(train), LiveBytes(before) as live:
            kept = [0]
            at_end = twin.base.base_model.register_forward_hook(lambda *_: kept.append(live.now))
            scores = compute()
            at_end.remove()
            if train:
                total = scores.sum()
                del scores
                total.backward()
    return Passes(kept[-1], live.peak, len(live.products))


@contextmanager
def _gradients(twin: Twin) -> Iterator[list[torch.Tensor]]:
    """Have a gradient at each trained parameter, as after the first micro-batch of a step."""
    with twin.mode:
        for parameter in twin.trainable():
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in twin.trainable()]
    try:
        yield gradients
    finally:
        for parameter in twin.trainable():
            parameter.grad = None


@contextmanager
def _checkpointed(twin: Twin, wanted: bool) -> Iterator[None]:
    """Recompute layers within the block, as Trainer and TRL arrange it."""
    if not wanted:
        yield
        return
    twin.model.gradient_checkpointing_enable()
    twin.model.enable_input_require_grads()
    try:
        yield
    finally:
        twin.base.disable_input_require_grads()
        twin.base.gradient_checkpointing_disable()


class _Keep(torch.autograd.Function):  # type: ignore[misc]
    """Passes a tensor on and keeps it for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.x = x  # as bitsandbytes does it: what torch would save might be computed again (`engine/gated_mlp.py`)
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


@contextmanager
def _inputs_kept(twin: Twin) -> Iterator[None]:
    """Have layers quantised to 8 bits keep their input (bitsandbytes 0.50, `autograd/_functions.py`)."""
    handles = []
    if twin.bits == 8:
        for name, module in twin.base.named_modules():
            if name.removesuffix(".base_layer") in twin.quantised and isinstance(module, torch.nn.Linear):
                handles.append(module.register_forward_pre_hook(lambda _, inputs: (_Keep.apply(inputs[0]),)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
