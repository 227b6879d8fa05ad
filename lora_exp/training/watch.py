"""Steps that teach nothing or ruin what was learned: the run stops before they count, and names their rows.

Read in transformers 5.23, `Trainer._run_epoch`: the batches of a step come from `get_batch_samples`, each is handed to
`training_step`, and the norm of the gradient is taken once before the optimizer moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_exp.data.kinds import IGNORED
from lora_exp.errors import Problem, UserError, count

if TYPE_CHECKING:
    from lora_exp.data.tokenize import TokenizedData

SHOWN = 20
"""Rows of a step that are named one by one."""

SILENT = 3
"""Optimiser steps without any gradient, from the first one on, after which a run stops."""

SMALLER_STEPS = "lower trainer.learning_rate, raise trainer.warmup_steps, or train in fp32: trainer.bf16=false"


class WatchedSteps:
    """Mixed in before a TRL trainer that has `scored_labels(inputs)` and `difference_at_start(batch)`.

    Attributes:
        zero_loss: Whether a loss of exactly 0 can be right.
        starts_alike: Whether policy and reference compute the same before the first step, but for what is dropped.
        rows: Names the rows of a batch.
    """

    zero_loss: bool
    starts_alike: bool
    rows: RowNames
    _learned: bool = False
    _batches: Sequence[Any] = ()
    _losses: list[torch.Tensor]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Remember the batches of the step."""
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self._batches, self._losses = batches, []
        return batches, number

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Remember the loss of the batch."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Look at loss and gradient before the optimizer uses them."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        loss = torch.stack(self._losses).sum().float()
        scored = torch.stack([(self.scored_labels(each)[:, 1:] != IGNORED).sum() for each in self._batches])  # type: ignore[attr-defined]
        numbers = torch.stack([loss, _on(norm, loss), _on(scored.sum(), loss)]).tolist()
        self._require_sense(*numbers)
        if self.state.global_step == 0 and self.starts_alike and math.isfinite(numbers[1]):  # type: ignore[attr-defined]
            _require_no_difference(self.difference_at_start(self._batches[0]))  # type: ignore[attr-defined]
        self._require_gradient(numbers[1])
        return norm

    def _require_gradient(self, norm: float) -> None:
        """Check that some adapter weight has had a gradient in the first steps.

        Raises:
            UserError: If none has: the run would finish with the adapter that it started with.
        """
        state = self.state  # type: ignore[attr-defined]
        self._learned = self._learned or norm != 0 or any(each.get("grad_norm") for each in state.log_history)
        done = state.global_step + 1
        if self._learned or done != min(SILENT, state.max_steps):
            return
        what = "the loss does not depend on any weight that trains"
        mend = "check lora.target_modules, recipe.loss_weights, and that prompts have lora.alora_invocation_tokens"
        title = f"nothing is learned: every gradient was exactly 0 in {count(done, 'step')}; the run stops"
        raise UserError(title, [Problem("lora", what, mend)])

    def _require_sense(self, loss: float, norm: float, scored: float) -> None:
        # fp16 scales the loss up until gradients overflow, and leaves such a step out.
        scaled = self.accelerator.scaler is not None  # type: ignore[attr-defined]
        if not scored:
            what, mend = "no token of it is scored", "leave these rows out, or raise recipe.max_length"
        elif not math.isfinite(loss):
            what, mend = f"its loss is {loss}", SMALLER_STEPS
        elif not math.isfinite(norm) and not scaled:
            what, mend = f"its loss is {loss:.4g}, and the norm of its gradient {norm}", SMALLER_STEPS
        elif loss == 0 and not self.zero_loss:
            what = "its loss is exactly 0, as if the model knew every token for sure"
            mend = "look at these rows: is there anything in them to learn?"
        else:
            return
        step = self.state.global_step + 1  # type: ignore[attr-defined]
        *problems, last = self.rows.of(self._batches) or [Problem("trainer", "its rows are not known")]
        problems.append(replace(last, mend=mend))
        raise UserError(f"step {step} cannot be learned from: {what}; the run stops before it", problems)


def _require_no_difference(difference: str | None) -> None:
    """Check that policy and reference start alike.

    Raises:
        UserError: If they do not: their difference is what DPO learns from.
    """
    if difference is None:
        return
    hint = "python -m lora_exp.store clear has the reference computed anew; engine=padded computes it in each step"
    raise UserError(
        "the policy and its reference do not start alike; the run stops before its first step",
        [Problem("rewards", difference, hint)],
    )


def _on(value: Any, other: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(value, dtype=other.dtype, device=other.device)


@dataclass(frozen=True)
class RowNames:
    """Finds the rows that a batch was made of by their token ids; read only when something went wrong."""

    data: TokenizedData
    answers: tuple[str, ...]

    def of(self, batches: Sequence[Any]) -> list[Problem]:
        """Return a place for each row of some batches, as `file:line`, with its index."""
        found = list(self._rows(batches))
        source = self.data.splits["train"].source
        lines = line_numbers(source)
        shown = [
            Problem(f"{source}:{lines[row]}" if row < len(lines) else source, f"row {row}")
            for row in islice(found, SHOWN)
        ]
        if len(found) > SHOWN:
            shown.append(Problem(source, f"and {count(len(found) - SHOWN, 'more row')}"))
        return shown

    def _rows(self, batches: Sequence[Any]) -> Iterator[int]:
        wanted = {
            tuple(ids[real.bool()].tolist())
            for batch in batches
            for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }
        for each in self.data.datasets["train"]:
            if any((*each["prompt_ids"], *each[f"{answer}_ids"]) in wanted for answer in self.answers):
                yield each["row"]


def line_numbers(source: str) -> list[int]:
    """Return the line of each row of a JSON Lines file; nothing where the source is no such file."""
    path: Any = Path(source)
    if source.startswith("pkg://"):
        package, _, name = source.removeprefix("pkg://").partition("/")
        path = files(package) / name
    if not source.endswith(".jsonl") or not path.is_file():
        return []
    with path.open("rb") as lines:
        return [number for number, line in enumerate(lines, start=1) if line.strip()]
