"""Whether the packed computation is exact for a run, found out before the first step."""

from __future__ import annotations

import json
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_exp.data.kinds import IGNORED
from lora_exp.engine import attention, forward
from lora_exp.engine.forward import PackedForward
from lora_exp.engine.packing import Family, PackedRow, Row, pack
from lora_exp.machine import is_out_of_memory
from lora_exp.models.bitsandbytes import computing_as_in_training, without_outliers

if TYPE_CHECKING:
    from lora_exp.engine.base import Work
    from lora_exp.models.policy import Policy
    from lora_exp.recipes.base import Recipe

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
"""`config.layer_types` that see nothing but earlier tokens through attention."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""How far hidden states may lie apart, as a share of their size; a token that sees one it should not moves them more.
Half precision: `HALF_TOLERANCE`."""
HALF_TOLERANCE = 0.06


def reason_against(work: Work) -> str | None:
    """Return why the packed computation would not be exact, or None.

    What the config tells is asked first; then a few random rows are computed both ways on the model itself.
    """
    base = work.policy.model.get_base_model()
    return _of_arguments(work.arguments) or reason_of_structure(base, work.recipe) or _of_model(base, work)


_FOUND: dict[str, str | None] = {}
"""What the random rows told in this process: the trials of a sweep mostly train the same adapter on the same base."""


def _of_model(base: Any, work: Work) -> str | None:
    """Return what random rows tell, or told of the same model: of the same weights with a new adapter of one kind.

    A new adapter's numbers are other ones with another seed. Which token sees which does not depend on them.
    """
    no_dropout = bool(getattr(work.recipe, "disable_dropout", False))
    if work.policy.start is not None:
        return _of_probe(base, work.longest, no_dropout)
    key = _model_key(base, work.policy, work.longest, no_dropout)
    if key not in _FOUND:
        _FOUND[key] = _of_probe(base, work.longest, no_dropout)
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
    )


def _of_arguments(arguments: dict[str, Any]) -> str | None:
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        return "several processes train together, which only it has been tried with"
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


def _of_probe(base: Any, longest: int, no_dropout: bool) -> str | None:
    """Compute random rows packed and one by one, and compare their last hidden states."""
    before = base.config._attn_implementation
    training = base.training
    base.eval()
    try:
        rows = _random_rows(base, longest)
        flat = pack([Family((row,)) for row in rows])
        reason = _compare(base, rows, flat)
        if reason is None:
            _train_once(base, flat, no_dropout)
    except _RefusedError as error:
        reason = f"{base.config.model_type}: {error}"
    finally:
        base.train(training)
    if reason is not None:
        base.set_attn_implementation(before)
    return reason


class _RefusedError(Exception):
    """A model takes no flat row."""


def _packed(base: Any, row: PackedRow) -> torch.Tensor:
    """Return the last hidden states of one flat row.

    Raises:
        _RefusedError: If the model's own code or our attention cannot deal with it.
    """
    try:
        return PackedForward(base).hidden(row)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        # Models raise all of these over a mask or positions that they do not expect (OpenAI GPT, BLOOM, XLM), so the
        # place tells a refusal from a mistake of ours.
        if _is_of_the_device(error) or not _is_a_refusal(error):
            raise
        raise _RefusedError(next(iter(str(error).splitlines()), type(error).__name__)) from error


def _is_of_the_device(error: Exception) -> bool:
    """Whether memory ran out or the device failed; the padded forward would need more memory, not less."""
    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or is_out_of_memory(error)


def _is_a_refusal(error: Exception) -> bool:
    """Whether it comes from the model, below `PackedForward`, or from the attention that the model calls."""
    modules: list[str] = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    last = max(number for number, name in enumerate(modules) if name.startswith("lora_exp."))
    called = modules[last + 1 : last + 2]
    return modules[last] == attention.__name__ or (
        modules[last] == forward.__name__ and called == [torch.nn.modules.module.__name__]
    )


def _random_rows(base: Any, longest: int) -> list[Row]:
    """Return rows that share starts, and one of its own; where a window is shorter than the longest row, it is longer.

    Four start alike, and two by two of them go on alike, as the rows of preference pairs with one system message do.
    """
    config = base.config.get_text_config()
    random = np.random.default_rng(0)
    window = getattr(config, "sliding_window", None)
    long = window + 8 if window and window < longest else 24

    def drawn(length: int) -> Any:
        return random.integers(0, config.vocab_size, length)

    system, prompts = drawn(4), [drawn(5) for _ in range(2)]
    starts = [np.concatenate([system, prompt]) for prompt in prompts]
    texts = [np.concatenate([start, drawn(length)]) for start in starts for length in (5, 7)]
    return [
        Row(number, ids.astype(np.int64), np.full(len(ids), IGNORED))
        for number, ids in enumerate([*texts, drawn(long)])
    ]


def _compare(base: Any, rows: list[Row], flat: PackedRow) -> str | None:
    with torch.no_grad(), computing_as_in_training(base), without_outliers(base):
        packed = _packed(base, flat)
        worst = 0.0
        for row in rows:
            alone = base.base_model(
                input_ids=torch.from_numpy(row.ids)[None].to(base.device), use_cache=False
            ).last_hidden_state[0]
            together = packed[torch.from_numpy(flat.places[row.index]).to(packed.device)]
            worst = max(worst, float((together - alone).norm() / alone.norm()))
    allowed = TOLERANCE.get(packed.dtype, HALF_TOLERANCE)
    if _quantised(base):
        allowed = max(allowed, HALF_TOLERANCE)
    if not worst <= allowed:
        return f"on random rows {base.config.model_type} computes something else packed (off by {worst:.1%})"
    return None


def _train_once(base: Any, flat: PackedRow, no_dropout: bool) -> None:
    """Compute as in training, where an attention may drop weights that no field of the config names.

    TRL's disable_dropout reaches layers alone; a share that is a number in the attention stays.
    """
    layers = [(layer, layer.p) for layer in base.modules() if isinstance(layer, torch.nn.Dropout)]
    base.train()
    try:
        for layer, _ in layers:
            layer.p = 0.0 if no_dropout else layer.p
        with torch.no_grad(), torch.random.fork_rng():
            _packed(base, flat)
    finally:
        for layer, share in layers:
            layer.p = share


def _quantised(base: Any) -> bool:
    return getattr(base, "quantization_method", None) is not None
