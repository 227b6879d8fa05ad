"""How far a policy has moved from its reference, in a number that does not scale with beta."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

ROWS = 8
"""Evaluation rows, the first ones, that the divergence is taken over: the same some hundred places in every trial.

Each costs a forward pass of policy and reference and their whole distributions: with 32 rows it was 45 % of an
evaluation of 60 pairs (SmolLM2-135M on two cores).
"""


def kl_per_token(
    model: Any, reference: Callable[[], AbstractContextManager[Any]], rows: Iterable[Mapping[str, list[int]]]
) -> float | None:
    """Return KL(policy || reference) of the next token, a mean over the places of the chosen answers.

    Exact at each place: summed over the vocabulary, not over sampled tokens.

    Args:
        model: The causal language model, its adapter layers inside.
        reference: Makes a context in which the model computes as the reference.
        rows: `prompt_ids` and `chosen_ids`.

    Returns:
        Nats a token; None where there are no rows.
    """
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            policy = _log_probs(model, row)
            with reference():
                other = _log_probs(model, row)
            total += float((policy.exp() * (policy - other)).sum())
            tokens += len(row["chosen_ids"])
    return total / tokens if tokens else None


def _log_probs(model: Any, row: Mapping[str, list[int]]) -> torch.Tensor:
    """Return the log-probabilities [answer tokens, vocabulary] before each token of the answer."""
    ids = torch.tensor([[*row["prompt_ids"], *row["chosen_ids"]]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(row["chosen_ids"]) + 1).logits[0, :-1]
    return logits.float().log_softmax(-1)
