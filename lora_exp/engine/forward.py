"""From a padded batch to the per-token scores that TRL's losses ask for, through one flat row a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import FusedCausalLMOutput

from lora_exp.data.kinds import IGNORED
from lora_exp.engine.attention import use_packed_attention
from lora_exp.engine.gated_mlp import fusable_mlps, fused_mlps
from lora_exp.engine.head import Head, TokenScores, score_tokens
from lora_exp.engine.layout import Layout
from lora_exp.engine.norms import fusable_norms, fused_norms
from lora_exp.engine.packing import PackedRow, Row
from lora_exp.engine.peft import fused_lora
from lora_exp.process.device import computes_bf16

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


class PackedForward:
    """A causal model's scores of a flat row.

    Args:
        base: The `PreTrainedModel`, its adapter layers inside.
        squares: Whether `log_sum_sq_probs` is wanted (WPO's weights).
    """

    def __init__(self, base: Any, squares: bool = False) -> None:
        use_packed_attention(base)
        self.base = base
        self.norms = fusable_norms(base)
        self.mlps = fusable_mlps(base)
        self.squares = squares

    def hidden(self, row: PackedRow) -> torch.Tensor:
        """Return the last hidden states of a flat row [T, hidden]."""
        device = self.base.device
        length, padding = len(row.ids), self._padding(len(row.ids))
        with self._fused():
            output = self.base.base_model(
                input_ids=torch.from_numpy(np.pad(row.ids, (0, padding)))[None].to(device),
                position_ids=torch.from_numpy(np.pad(row.positions, (0, padding)))[None].to(device),
                # transformers takes a mask of four dimensions as it is; without one it would build [T, T] for nothing.
                attention_mask=torch.empty(1, 1, 1, 1, device=device),
                use_cache=False,
                layout=Layout(row.segments, device, padding),
            )
        hidden: torch.Tensor = output.last_hidden_state[0, :length]
        return hidden

    def _padding(self, length: int) -> int:
        """Return how many tokens that nobody sees to put behind a flat row.

        On a processor oneDNN compiles each product in half precision anew for every length that it meets: some 40 ms a
        row. With lengths rounded up by at most a sixteenth it meets few.
        """
        device = self.base.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.base.dtype
        if device != "cpu" or narrow not in (torch.bfloat16, torch.float16):
            return 0
        step: int = max(16, 1 << (length.bit_length() - 5))
        return -length % step

    @contextmanager
    def _fused(self) -> Iterator[None]:
        """Compute adapters and norms in fewer passes within the block, and have MLPs keep less."""
        # Recomputing a checkpointed layer happens outside the block, and must compute the same.
        if _recomputes(self.base) or self._emulates():
            yield
            return
        with fused_lora(self.base), fused_norms(self.norms), fused_mlps(self.mlps):
            yield

    def _emulates(self) -> bool:
        """Whether a GPU only emulates the dtype that is computed in: there the libraries' own paths are left alone."""
        device = self.base.device
        half = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.base.dtype
        return device.type == "cuda" and half == torch.bfloat16 and not computes_bf16(device)

    def scores(self, row: PackedRow) -> TokenScores:
        """Return the scores of the flat row's S scored positions."""
        device = self.base.device
        hidden = self.hidden(row)[torch.from_numpy(row.scored).to(device)]
        return score_tokens(hidden, head_of(self.base), torch.from_numpy(row.targets).to(device), self.squares)


def _recomputes(base: Any) -> bool:
    """Whether some layer's activations are computed again in the backward pass (`GradientCheckpointingLayer`)."""
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def head_of(base: Any) -> Head:
    """Return the output layer of a model, with what its architecture does to logits.

    The names are those that `trl.trainer.utils.add_fused_lm_head` knows (TRL 1.16).
    """
    layer, config = base.get_output_embeddings(), base.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = getattr(config, name)
            break
    else:
        divisor = getattr(config, "logits_scaling", None)
        if divisor is not None:
            scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, first: int = 0) -> list[Row]:
    """Return the rows of a padded batch [N, L] without their padding.

    Args:
        input_ids: [N, L], padded on the right.
        attention_mask: [N, L].
        labels: [N, L]; `IGNORED` where a token is not scored.
        first: The number of the first row.
    """
    ids, marks = input_ids.cpu().numpy(), labels.cpu().numpy()
    lengths = attention_mask.sum(1).tolist()
    return [Row(first + n, ids[n, :length], marks[n, :length]) for n, length in enumerate(lengths)]


class PerToken:
    """The per-token fields of a padded batch [N, L - 1], filled a micro-batch at a time; 0 where nothing is scored."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.label_mask = labels[:, 1:] != IGNORED
        shape = self.label_mask.shape
        zeros = {name: torch.zeros(shape, device=labels.device) for name in FIELDS}
        zeros["is_top1"] = zeros["is_top1"].bool()
        self.fields = zeros

    def place(self, scores: TokenScores, rows: torch.Tensor, columns: torch.Tensor, sources: torch.Tensor) -> None:
        """Fill in what was scored, without its gradient."""
        for name, field in self.fields.items():
            field[rows, columns] = getattr(scores, name).detach()[sources]

    def output(self) -> FusedCausalLMOutput:
        """Return what a model with TRL's fused head returns; `log_probs` is a leaf that takes a gradient."""
        fields = dict(self.fields)
        fields["log_probs"] = fields["log_probs"].detach().requires_grad_(torch.is_grad_enabled())
        return FusedCausalLMOutput(**fields, label_mask=self.label_mask)


def places(row: PackedRow, numbers: Sequence[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return rows, columns and sources of those places of a flat row that lie in the batch rows `numbers`.

    Rows are counted from the first of `numbers`, which follow one another.
    """
    first, last = numbers[0], numbers[-1]
    inside = np.flatnonzero((row.rows >= first) & (row.rows <= last))
    parts = row.rows[inside] - first, row.columns[inside], row.sources[inside]
    return tuple(torch.from_numpy(part).to(device) for part in parts)
