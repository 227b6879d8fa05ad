"""Direct preference optimisation (arXiv 2305.18290): prefer the chosen answer over the rejected one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from lora_exp.data.kinds import PREFERENCE
from lora_exp.library_fields import one_of
from lora_exp.recipes.base import Recipe
from lora_exp.rules import Rule

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_exp.engine.base import Engine
    from lora_exp.models.policy import Policy

LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""TRL 1.16's, `DPOTrainer._compute_loss`."""
F_DIVERGENCE_LOSS_TYPES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""Those for which the f-DPO normaliser cancels (TRL 1.16, `DPOTrainer.__init__`)."""
SORTING_LOSS_TYPES = {"aot", "aot_unpaired"}
"""Those that compare the sorted log-ratios of a batch, so that each pair's loss depends on the others."""
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


LossType = Annotated[str, AfterValidator(lambda value: one_of(LOSS_TYPES, value))]
FDivergence = Annotated[str, AfterValidator(lambda value: one_of(F_DIVERGENCES, value))]


def loss_types(value: Any) -> list[str]:
    """Return `recipe.loss_type` as a list, as TRL keeps it."""
    return [value] if isinstance(value, str) else list(value or [])


class DPO(Recipe):
    """TRL's DPOTrainer; the loss fields have TRL's names."""

    name = "dpo"
    row_kind = PREFERENCE
    needs_reference = True
    logged = Recipe.logged | {
        f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")
    } | {"rewards/accuracies", "rewards/margins", "logp_shift/chosen", "logp_shift/rejected", "kl/chosen"}  # fmt: skip
    headline = {
        "loss": "loss",
        "rewards/accuracies": "reward accuracy",
        "rewards/margins": "margin",
    }
    library_class = "trl.DPOConfig"

    beta: float = Field(gt=0)
    loss_type: LossType | list[LossType]
    loss_weights: list[float] | None
    label_smoothing: float = Field(ge=0, le=1)
    ld_alpha: float | None = Field(ge=0, le=1)
    f_divergence_type: FDivergence
    f_alpha_divergence_coef: float
    use_weighting: bool
    discopop_tau: float = Field(gt=0)
    disable_dropout: bool

    rules = (
        *Recipe.rules,
        Rule(
            ("recipe.label_smoothing", "recipe.loss_type"),
            lambda smoothing, kind: "robust" in loss_types(kind) and smoothing >= 0.5,
            "the robust loss needs a share of flipped labels below 0.5, not {0}",
            "recipe.label_smoothing=0.1",
        ),
        Rule(
            ("recipe.label_smoothing", "recipe.loss_type"),
            lambda smoothing, kind: "exo_pair" in loss_types(kind) and smoothing == 0,
            "the exo_pair loss needs label smoothing above 0",
            "recipe.label_smoothing=0.001",
        ),
        Rule(
            ("recipe.loss_weights", "recipe.loss_type"),
            lambda weights, kind: weights is not None and len(weights) != len(loss_types(kind)),
            "{0} does not give one weight to each of {1}",
            "recipe.loss_type=[sigmoid,sft] recipe.loss_weights=[1.0,0.2]",
        ),
        Rule(
            ("recipe.f_divergence_type", "recipe.loss_type"),
            lambda divergence, kind: (
                divergence != "reverse_kl" and not set(loss_types(kind)) <= F_DIVERGENCE_LOSS_TYPES
            ),
            "{0} is not defined for loss_type={1}",
            "recipe.f_divergence_type=reverse_kl",
        ),
        Rule(
            ("recipe.use_weighting", "recipe.loss_type"),
            lambda weighting, kind: weighting is True and not SORTING_LOSS_TYPES.isdisjoint(loss_types(kind)),
            "WPO weighting does not go with the aot losses, which sort the batch",
            "recipe.use_weighting=false",
        ),
        Rule(
            ("recipe.use_weighting", "recipe.loss_type"),
            lambda weighting, kind: weighting is True and "sft" in loss_types(kind),
            "TRL 1.16 fails to weight the sft loss, which is one number for the whole batch",
            "recipe.use_weighting=false, or leave sft out of recipe.loss_type",
        ),
        Rule(
            ("recipe.sync_ref_model",),
            lambda sync: sync is True,
            "a moving reference does not go with LoRA in TRL",
            "leave recipe.sync_ref_model out",
        ),
    )

    unused = (
        Rule(
            ("recipe.label_smoothing", "recipe.loss_type"),
            lambda _, kind: set(loss_types(kind)).isdisjoint({"robust", "exo_pair"}),
            "loss_type={1} does not use it",
            "recipe.loss_type=robust",
        ),
        Rule(
            ("recipe.discopop_tau", "recipe.loss_type"),
            lambda _, kind: "discopop" not in loss_types(kind),
            "loss_type={1} does not use it",
            "recipe.loss_type=discopop",
        ),
        Rule(
            ("recipe.f_alpha_divergence_coef", "recipe.f_divergence_type"),
            lambda _, divergence: divergence != "alpha_divergence",
            "f_divergence_type={1} does not use it",
            "recipe.f_divergence_type=alpha_divergence",
        ),
        Rule(
            ("lora.lora_dropout", "recipe.disable_dropout"),
            lambda _, disabled: disabled is True,
            "recipe.disable_dropout=true turns it off",
            "recipe.disable_dropout=false",
        ),
    )

    @property
    def compares_examples(self) -> bool:
        """Whether a loss sorts the pairs of a batch."""
        return not SORTING_LOSS_TYPES.isdisjoint(loss_types(self.loss_type))

    @property
    def zero_loss(self) -> bool:
        """Whether a loss of exactly 0 can be right: hinge's beyond its margin, sigmoid's once it underflows."""
        return set(loss_types(self.loss_type)) != {"sft"}

    def trainer(
        self,
        engine: Engine,
        policy: Policy,
        tokenizer: Any,
        datasets: dict[str, Dataset],
        arguments: dict[str, Any],
        callbacks: list[Any],
    ) -> Any:
        """Return a DPOTrainer over rows that are tokenised already."""
        from trl import DPOConfig

        from lora_exp.recipes.trl import TokenizedDPOTrainer
        from lora_exp.training.arguments import on_one_device
        from lora_exp.training.reliable import reliable

        return reliable(engine.trainer_class(TokenizedDPOTrainer))(
            reference=policy.reference,
            model=policy.model,
            args=on_one_device(DPOConfig(**arguments, **self.trl_fields), policy.device),
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("val"),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
