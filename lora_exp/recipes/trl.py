"""What this project knows of TRL's private parts. Read in trl 1.16.0, `trl/trainer/{base,sft,dpo}_trainer.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from trl import DPOTrainer, SFTTrainer
from trl.trainer import utils
from trl.trainer.utils import use_adapter

from lora_exp.recipes.divergence import ROWS, kl_per_token
from lora_exp.recipes.totals import CarriedTotals

PAGES = 2 * 4096
"""Bytes that a row of a tile touches at least: it rarely begins and ends with a page."""


@contextmanager
def touched_tiles(vocabulary: int, itemsize: int) -> Iterator[None]:
    """Have the output layer ask within the block for tiles as wide as it touches; else its memory is miscounted.

    It asks for 32,768 columns; beyond a small vocabulary no page of them is ever touched.

    Args:
        vocabulary: Columns that it fills.
        itemsize: Bytes of a number.
    """
    before = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(before, max(vocabulary, PAGES // itemsize))
    try:
        yield
    finally:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = before


class _Quiet:
    """Leaves out what TRL does beside training."""

    def _send_telemetry(self) -> None:
        """Tell the hub nothing: these subclasses are counted as "other" there, and a run needs no network."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card beside the checkpoints; PEFT writes one into the adapter."""


class TokenizedSFTTrainer(_Quiet, CarriedTotals, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer over `input_ids` and `labels`."""

    def scored_labels(self, inputs: dict[str, Any]) -> Any:
        """Return the labels [N, L] of a batch, -100 where a token carries no loss."""
        return inputs["labels"]


class TokenizedDPOTrainer(_Quiet, CarriedTotals, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer over `prompt_ids`, `chosen_ids`, `rejected_ids`, with the reference that is asked for.

    Args:
        model: The `PeftModel` to train.
        reference: `adapter off` (the base) or `start adapter` (a frozen copy of the adapter, beside it on the
            same base). TRL makes such a copy of any `PeftModel` that it is given.
        kwargs: DPOTrainer's other arguments.
    """

    def __init__(self, *, model: Any, reference: str, **kwargs: Any) -> None:
        # The copy is made by adding an adapter with the same config and then copying the weights; with PiSSA's,
        # adding it would take a second part out of the base.
        lora = model.peft_config["default"]
        wanted, lora.init_lora_weights = lora.init_lora_weights, True
        super().__init__(model=model, **kwargs)
        lora.init_lora_weights = wanted
        if reference == "adapter off":
            self.model.delete_adapter("ref")
        else:
            self._match_reference_dtype()

    def _match_reference_dtype(self) -> None:
        """Give the copy its original's dtype and freeze it.

        On a quantised base TRL narrows the trained adapter to bf16 after it has copied it, so the two would no
        longer compute the same, and step 0 would not have a reward of exactly 0.
        """
        parameters = dict(self.model.named_parameters())
        for name, original in parameters.items():
            if ".default" in name:
                copy = parameters[name.replace(".default", ".ref")]
                copy.data = copy.data.to(original.dtype)
                copy.requires_grad_(False)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to an evaluation how far the policy is from the reference, by measures that do not scale with beta."""
        rewards = self._metrics["eval"]
        if "eval_loss" in logs and "rewards/chosen" in rewards:
            for side in ("chosen", "rejected"):
                # TRL's reward is beta times the sum of the answer's log-ratios.
                logs[f"eval_logp_shift/{side}"] = fmean(rewards[f"rewards/{side}"]) / self.beta
            logs["eval_kl/chosen"] = self._kl()
        super().log(logs, start_time)

    def _kl(self) -> float:
        model = self.accelerator.unwrap_model(self.model)
        name = "ref" if "ref" in model.peft_config else None
        rows = self.eval_dataset.select(range(min(ROWS, len(self.eval_dataset))))
        with self.accelerator.autocast():
            found = kl_per_token(model.get_base_model(), lambda: use_adapter(model, adapter_name=name), rows)
        assert found is not None, "an evaluation has rows"
        return found

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Take the rows as they are: they were tokenised and cut in `lora_exp.data.tokenize`."""
        return dataset

    def scored_labels(self, inputs: dict[str, Any]) -> Any:
        """Return the labels [N, L] of a batch, -100 where a token carries no loss, as `_compute_loss` makes them."""
        return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
