"""The output layer's scores are TRL's, and their gradient is autograd's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.kernels import ChunkedLogProbFunction

from lora_exp.engine import head
from lora_exp.engine.head import Head, score_tokens

FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def plain_log_probs(hidden: torch.Tensor, output: Head, targets: torch.Tensor) -> torch.Tensor:
    z = torch.nn.functional.linear(hidden, output.weight, output.bias) * output.scale
    if output.softcap is not None:
        z = output.softcap * torch.tanh(z / output.softcap)
    return z.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 70),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 5.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_scores_are_trls(
    tokens: int, vocabulary: int, bias: bool, scale: float, softcap: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 16, dtype=dtype)
    output = Head(
        torch.randn(vocabulary, 16, dtype=dtype), torch.randn(vocabulary, dtype=dtype) if bias else None, scale, softcap
    )
    targets = torch.randint(0, vocabulary, (tokens,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "TILE_BYTES", 16 * 4 * vocabulary)
        found = score_tokens(hidden.requires_grad_(), output, targets, squares=True)
        (slope,) = torch.autograd.grad(found.log_probs.sum(), hidden)
    trl = ChunkedLogProbFunction.apply(
        hidden, output.weight, output.bias, targets, 1.0, vocabulary, softcap, scale, FIELDS
    )
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    for name, theirs in zip(names, trl, strict=True):
        torch.testing.assert_close(getattr(found, name), theirs, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(trl[0].sum(), hidden)
    tolerance = 0.05 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(slope, wanted, rtol=tolerance, atol=tolerance)


def test_the_gradient_is_autograds_token_by_token() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    output = Head(torch.randn(50, 16, dtype=torch.float64))
    targets, upstream = torch.randint(0, 50, (7,)), torch.randn(7)
    found = torch.autograd.grad(score_tokens(hidden, output, targets).log_probs, hidden, upstream)[0]
    wanted = torch.autograd.grad(plain_log_probs(hidden, output, targets), hidden, upstream.double())[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    output = Head(torch.tensor([[1.0], [2.0], [2.0]]))
    found = score_tokens(torch.ones(3, 1), output, torch.tensor([0, 1, 2]))
    assert found.is_top1.tolist() == [False, True, False]
