"""What this project knows of TRL's private parts. Read in trl 1.16.0, `trl/trainer/{base,sft,dpo}_trainer.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from trl import DPOTrainer, SFTTrainer
from trl.trainer import utils
from trl.trainer.utils import FusedCausalLMOutput, use_adapter

from lora_exp.recipes.divergence import ROWS, kl_per_token
from lora_exp.recipes.totals import CarriedTotals

SUM_NOISE, TOKEN_NOISE, SCALE_NOISE = 8, 1 / 16, 4
"""How many rounding errors two computations of an answer's log-probability may lie apart, as a share of it: of its
float32 sum; of its tokens in the compute dtype, which mostly cancel; and of those with DoRA in half precision, which
multiplies each output by a rounded number, so that they do not cancel. Measured in first steps: 1.1, 1/100, 1.6."""

LEAST_SIZE = 30.0
"""Nats below which rounding no longer follows the log-probability: logits have such a size."""

LEAST_NOISE = 1e-3
"""Nats that two computations of an answer may lie apart however short it is: rounding grows with the layers of a model,
and the largest of a step with its pairs. Measured in float32 with 30 layers and 256 pairs: 5e-5."""

SIDES = ("chosen", "rejected")
LOGGED = ("logps", "rewards")

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


class _Adjusted:
    """Leaves out what TRL does beside training, and narrows adapters only in a run that computes in bf16.

    TRL has the adapters of a quantised base in bf16, whatever a run computes in. GradScaler, which fp16 needs, cannot
    unscale gradients in bf16 (torch 2.13, `amp/grad_scaler.py`). In a float32 run, ten steps with bf16 adapters differ
    by 1e-3 between two orders of the same sums, and by 1e-6 with float32 ones.
    """

    def __init__(self, *, model: Any, **kwargs: Any) -> None:
        given = {name: each.data for name, each in model.named_parameters() if each.requires_grad}
        super().__init__(model=model, **kwargs)  # type: ignore[call-arg]
        if not self.args.bf16:  # type: ignore[attr-defined]
            give_back(model, given)

    def _send_telemetry(self) -> None:
        """Tell the hub nothing: these subclasses are counted as "other" there, and a run needs no network."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card beside the checkpoints; PEFT writes one into the adapter."""


def give_back(model: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> None:
    """Give what trains the numbers that it had, by name: narrowed ones cannot be widened again."""
    for name, data in given.items():
        parameter = model.get_parameter(name)
        parameter.data = data.to(parameter.device)


class TokenizedSFTTrainer(_Adjusted, CarriedTotals, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer over `input_ids` and `labels`."""

    def scored_labels(self, inputs: dict[str, Any]) -> Any:
        """Return the labels [N, L] of a batch, -100 where a token carries no loss."""
        return inputs["labels"]

    def difference_at_start(self, batch: dict[str, Any]) -> None:
        """Return nothing: there is no reference to differ from."""


class TokenizedDPOTrainer(_Adjusted, CarriedTotals, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer over `prompt_ids`, `chosen_ids`, `rejected_ids`, with the reference that is asked for.

    Args:
        model: The `PeftModel` to train.
        reference: `adapter off` (the base) or `start adapter` (a frozen copy of the adapter, beside it on the
            same base). TRL makes such a copy of any `PeftModel` that it is given.
        kwargs: DPOTrainer's other arguments.
    """

    _first: dict[int, tuple[dict[str, Any], torch.Tensor]]
    """By batch of the first step: the batch, and its log-probabilities by token."""

    def __init__(self, *, model: Any, reference: str, **kwargs: Any) -> None:
        self._first = {}
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

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Remember what the policy computes before the first step, where the reference is known by row."""
        if self.state.global_step:
            self._first.clear()  # of a run that never asks for the difference
        if self.state.global_step or not self.precompute_ref_logps or not self.model.training:
            return super()._compute_loss(model, inputs, return_outputs)

        def remembered(**kwargs: Any) -> Any:
            output = model(**kwargs)
            # Of a batch that several micro-batches share, the last output is whole.
            self._first[id(inputs["ref_chosen_logps"])] = inputs, output.log_probs.detach()
            return output

        return super()._compute_loss(remembered, inputs, return_outputs)

    def difference_at_start(self, batch: dict[str, Any]) -> str | None:
        """Return how the rewards of the first step differ from those of a new adapter, which are 0; None if not.

        TRL's rewards are beta times the log-ratios of answers. A model that drops at random in training differs from
        its reference anyway.

        Args:
            batch: One of the step.
        """
        first, self._first = list(self._first.values()), {}
        logps, ratios = self._by_row(first) if first else self._by_batch()
        rounding, exact = self._rounding(), torch.finfo(torch.float32).eps
        scales = rounding > exact and any(each.use_dora for each in self.model.peft_config.values())
        errors = SUM_NOISE * exact + (SCALE_NOISE if scales else TOKEN_NOISE) * rounding
        noise = self.beta * (errors * logps.abs().clamp(min=LEAST_SIZE) + LEAST_NOISE)
        rewards = self.beta * ratios
        if bool((rewards.abs() <= noise).all()) or self._computes_at_random(batch):
            return None
        # Both of one pair: the one that is furthest beyond what rounding explains.
        worst = int((rewards.abs() / noise).amax(dim=0).argmax())
        chosen, rejected = rewards[:, worst].tolist()
        due = noise[:, worst].min()
        found = f"chosen {chosen:.2g}, rejected {rejected:.2g}"
        return f"{found} in step 1, and 0 within {due:.1g} is due: the adapter has not moved yet"

    def _by_row(self, first: list[tuple[dict[str, Any], torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and log-ratios [2, N] of the step's pairs, chosen and rejected."""
        # TRL sums them; of a model it takes nothing but its answer.
        answers = [FusedCausalLMOutput(log_probs=each) for _, each in first]
        logps = [
            torch.stack(self.compute_ref_log_probs(lambda answer=answer, **_: answer, inputs))
            for answer, (inputs, _) in zip(answers, first, strict=True)
        ]
        known = [torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]) for inputs, _ in first]
        policy = torch.cat(logps, dim=1)
        return policy, policy - torch.cat(known, dim=1).to(policy)

    def _by_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same [2, 1] as means over the step, where TRL computed the reference in it."""
        metrics = self._metrics["train"]
        logps, rewards = (torch.tensor([[fmean(metrics[f"{name}/{side}"])] for side in SIDES]) for name in LOGGED)
        return logps, rewards / self.beta

    def _computes_at_random(self, batch: dict[str, Any]) -> bool:
        """Whether two passes over a row differ; asked only where a difference was found. Costs no random number."""
        row = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
        row = {name: each.to(self.model.device) for name, each in row.items()}
        base = self.model.get_base_model().base_model
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), self.accelerator.autocast():
            first, second = (base(**row, use_cache=False).last_hidden_state for _ in range(2))
        return not torch.equal(first, second)

    def _rounding(self) -> float:
        """Return the rounding error of the lowest dtype that the model computes in."""
        half = self.args.bf16 or self.args.fp16
        dtypes = {getattr(each, "compute_dtype", None) for each in self.model.modules()}
        frozen = (each for each in self.model.parameters() if not each.requires_grad)
        dtypes |= {each.dtype for each in frozen if each.is_floating_point()}
        dtypes |= {torch.float16 if self.args.fp16 else torch.bfloat16} if half else set()
        return float(max(torch.finfo(each).eps for each in dtypes if isinstance(each, torch.dtype)))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to an evaluation how far the policy is from the reference, by measures that do not scale with beta."""
        rewards = self._metrics["eval"]
        if "eval_loss" in logs and "rewards/chosen" in rewards:
            for side in SIDES:
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
