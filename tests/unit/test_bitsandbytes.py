"""8-bit layers of bitsandbytes: whose numbers depend on which."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt

from lora_exp.models.bitsandbytes import computing_as_in_training, without_outliers


class Eight(torch.nn.Module):
    """A layer as transformers loads it, for evaluation."""

    is_loaded_in_8bit = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu")
        self.eval()

    def change_of_a_row(self) -> float:
        """Return how far a row's output moves when the row beside it has a large value."""
        x = torch.randn(2, 64)
        alone = self.layer(x)[0]
        x[1, ::3] = 20.0
        return float((self.layer(x)[0] - alone).norm() / alone.norm())


def test_in_evaluation_a_rows_numbers_depend_on_the_rows_beside_it() -> None:
    """What the two contexts are for; if bitsandbytes changes this, they can go."""
    with torch.no_grad():
        assert Eight().change_of_a_row() > 1e-3


@pytest.mark.parametrize("context", [computing_as_in_training, without_outliers])
def test_in_the_contexts_they_do_not(context: Callable[[Any], AbstractContextManager[None]]) -> None:
    model = Eight()
    with torch.no_grad(), context(model):
        assert model.change_of_a_row() < 1e-6
    assert not model.layer.training
    assert model.layer.state.threshold == 6.0
