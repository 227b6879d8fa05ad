"""Whether the packed computation is exact for a run, found out before the first step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from lora_exp.engine.probe import Probe

if TYPE_CHECKING:
    from lora_exp.engine.base import Work
    from lora_exp.models.policy import Policy
    from lora_exp.recipes.base import Recipe

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
"""`config.layer_types` that see nothing but earlier tokens through attention."""


def reason_against(work: Work) -> str | None:
    """Return why the packed computation would not be exact, or None.

    The config answers first; then the model itself computes a few random rows both ways, forward and backward.
    """
    base = work.policy.model.get_base_model()
    return _of_arguments(work.arguments) or reason_of_structure(base, work.recipe) or _of_model(base, work)


_FOUND: dict[str, str | None] = {}
"""What the random rows told in this process: the trials of a sweep mostly train the same adapter on the same base."""


def _of_model(base: Any, work: Work) -> str | None:
    """Return what random rows tell, or told of the same model: of the same weights with a new adapter of one kind.

    A new adapter's numbers are other ones with another seed. Which token sees which does not depend on them.
    """
    probe = Probe(base, work.longest, work.policy.precision.dtype, bool(getattr(work.recipe, "disable_dropout", False)))
    if work.policy.start is not None:
        return probe.reason()
    key = _model_key(base, work.policy, work.longest, probe.no_dropout)
    if key not in _FOUND:
        _FOUND[key] = probe.reason()
    return _FOUND[key]


def _model_key(base: Any, policy: Policy, longest: int, no_dropout: bool) -> str:
    """Return what two models have in common that compute the random rows alike."""
    parts = [
        type(base).__qualname__,
        base.config.to_dict(),
        base.config._attn_implementation,
        dict(policy.base),
        str(base.dtype),
        str(policy.device),
        policy.precision.dtype,
        policy.model.peft_config["default"].to_dict(),
        longest,
        no_dropout,
    ]
    return json.dumps(parts, sort_keys=True, default=_sorted)


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def reason_of_structure(base: Any, recipe: Recipe) -> str | None:
    """Return why the packed computation would not be exact, as far as a model without weights tells it, or None."""
    return (
        _of_architecture(base)
        or _of_router(base.config.get_text_config(), recipe)
        or _of_dropout(base, recipe)
        or _of_head(base)
        or _of_adapter(base)
    )


def _of_arguments(arguments: dict[str, Any]) -> str | None:
    if arguments.get("label_smoothing_factor"):
        return "trainer.label_smoothing_factor needs the logits of every token"
    if arguments.get("torch_compile"):
        return "trainer.torch_compile wants batches of one shape"
    return None


def _of_architecture(base: Any) -> str | None:
    config = base.config.get_text_config()
    if config is not base.config:
        return f"{base.config.model_type} is a multimodal model"
    unknown = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if unknown:
        return f"{config.model_type} has {', '.join(sorted(unknown))} layers"
    return None


def _of_router(config: Any, recipe: Recipe) -> str | None:
    """TRL adds the router's loss wherever a config can tell it and gives it a share, asked for or not."""
    share = recipe.trl_fields.get("router_aux_loss_coef")
    share = getattr(config, "router_aux_loss_coef", 0.0) if share is None else share
    if hasattr(config, "output_router_logits") and share:
        return "the router's loss of a mixture of experts is taken over padded batches"
    return None


def _of_dropout(base: Any, recipe: Recipe) -> str | None:
    """Attention dropout falls on weights that only sdpa computes."""
    config = base.config.get_text_config()
    share = max(getattr(config, name, None) or 0.0 for name in ("attention_dropout", "attn_pdrop"))
    if share and not getattr(recipe, "disable_dropout", False):
        return f"{config.model_type} drops {share:.0%} of its attention weights in training"
    return None


def _of_head(base: Any) -> str | None:
    head = base.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return f"its output layer is a {type(head).__name__}"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "its output layer is trained"
    return None


def _of_adapter(base: Any) -> str | None:
    """An activated LoRA (aLoRA) works from the last place of its invocation tokens in each row of a batch on."""
    configs = getattr(base, "peft_config", {}).values()
    if any(getattr(config, "alora_invocation_tokens", None) is not None for config in configs):
        return "lora.alora_invocation_tokens are looked for in each row of a padded batch"
    return None
