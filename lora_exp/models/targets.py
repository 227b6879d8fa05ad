"""Which layers of a model get an adapter."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from lora_exp.errors import Problem, UserError
from lora_exp.library_fields import nearest


def linear_layers(model: Any) -> list[str]:
    """Return the full names of the layers that LoRA can adapt: linear ones (quantised too) and GPT-2's Conv1D.

    The head is left out; embeddings are no linear layers.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def quantised_layers(model: Any, kept: Sequence[str] | None) -> list[str]:
    """Return the full names of the linear layers that transformers would quantise.

    Args:
        model: A causal language model from transformers, before it is quantised.
        kept: `quant.llm_int8_skip_modules`, for 4 bits too. It replaces transformers' own list, which is the head.

    Raises:
        UserError: If the head is among them: both engines multiply with its weight as it is stored. If no layer is
            left to quantise. If a pattern matches no layer.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    layers = linear_layers(model)
    if kept is None:
        return layers
    head = _head(model)
    problems = [
        _no_such_layer("quant.llm_int8_skip_modules", each, _endings([*layers, head]))
        for each in kept
        if all(should_convert_module(name, [each]) for name in [*layers, head])
    ]
    if head and should_convert_module(head, list(kept)):
        what = f"leaves out {head}, the output layer, which cannot be quantised"
        names = ",".join(QuotedString(each, Quote.double).with_quotes() for each in [head, *kept])
        mend = shlex.quote(f"+quant.llm_int8_skip_modules=[{names}]")
        problems.append(Problem("quant.llm_int8_skip_modules", what, mend))
    quantised = [name for name in layers if should_convert_module(name, list(kept))]
    if not quantised:
        problems.append(Problem("quant.llm_int8_skip_modules", "leaves no layer to quantise", "quant=none"))
    if problems:
        raise UserError("the model cannot be quantised so", problems)
    return quantised


def _endings(layers: Sequence[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in layers} - {""})


def _head(model: Any) -> str:
    """Return the full name of the output layer; empty where there is none."""
    head = model.get_output_embeddings()
    return next((name for name, part in model.named_modules() if part is head), "")


def uses_conv1d(model: Any, names: Sequence[str]) -> bool:
    """Whether these layers keep their weight as (in, out), which PEFT calls `fan_in_fan_out`."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(model.get_submodule(name), Conv1D) for name in names)


def choose_targets(model: Any, wanted: Sequence[str] | str) -> list[str]:
    """Return the layers to adapt, as the shortest names that mean exactly them where there are such.

    Args:
        model: A causal language model from transformers.
        wanted: `auto` for every linear layer but the head; a list of names or endings of names (`q_proj`); or a
            regular expression that a layer's whole name must match, as in PEFT.

    Raises:
        UserError: If a name or the expression matches no layer; the message lists the names there are.
    """
    layers = linear_layers(model)
    endings = _endings(layers)
    if wanted == "auto":
        return layers if _head(model).rpartition(".")[2] in endings else endings
    if not wanted:
        raise UserError("there is nothing to adapt", [Problem("lora.target_modules", "names no layer", "auto")])
    if isinstance(wanted, str):
        try:
            matched = [name for name in layers if re.fullmatch(wanted, name)]
        except re.error as error:
            problem = Problem("lora.target_modules", f"{wanted!r} is no regular expression: {error}")
            raise UserError("there is nothing to adapt", [problem]) from error
        unmatched = [] if matched else [wanted]
    else:
        matched = list(wanted)
        unmatched = [want for want in wanted if not any(_means(want, name) for name in layers)]
    if unmatched:
        problems = [_no_such_layer("lora.target_modules", want, endings) for want in unmatched]
        raise UserError("there is nothing to adapt", problems)
    return matched


def _means(want: str, name: str) -> bool:
    """Whether PEFT takes `want` for this layer: its whole name or its last parts."""
    return name == want or name.endswith(f".{want}")


def _no_such_layer(key: str, want: str, endings: list[str]) -> Problem:
    near = nearest(want, endings)
    mend = f"this model has {', '.join(endings)}" + (f"; did you mean {near}?" if near else "")
    return Problem(key, f"{want!r} matches no layer", mend)
