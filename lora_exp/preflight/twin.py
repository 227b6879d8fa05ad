"""A model without its weights: the structure that a run will train, made from config.json, in torch's fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_exp.config import Config
from lora_exp.engine.dropout import drops
from lora_exp.models.policy import lora_config, refused_layers, told_if_it_needs_code
from lora_exp.models.precision import Precision
from lora_exp.models.targets import quantised_layers


@dataclass(frozen=True)
class Twin:
    """The structure of a policy.

    Args:
        model: The `peft.PeftModel`, in fake tensors.
        mode: The mode in which its tensors compute.
        quantised: Names of the layers that a quantised base keeps in fewer bits.
        bits: How many; None where it is not quantised.
        nested: Whether its scales are quantised too.
    """

    model: Any
    mode: FakeTensorMode
    quantised: frozenset[str]
    bits: int | None
    nested: bool

    @property
    def base(self) -> Any:
        """The `PreTrainedModel`, its adapter layers inside."""
        return self.model.get_base_model()

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return what training moves."""
        return [each for each in self.model.parameters() if each.requires_grad]

    @property
    def drops(self) -> bool:
        """Whether training drops values."""
        return drops(self.model.train())

    def disable_dropout(self) -> None:
        """Drop nothing, as TRL has it where it is asked for."""
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    @property
    def base_parameters(self) -> int:
        """The base's numbers, however many bits each has."""
        return sum(each.numel() for _, each in self._frozen())

    @property
    def base_bytes(self) -> int:
        """What the base takes, its layers quantised or not."""
        return sum(self._bytes(name, each) for name, each in self._frozen())

    @property
    def widest_quantised(self) -> int:
        """Numbers of the largest quantised weight: it is widened for each product."""
        return max((each.numel() for name, each in self._frozen() if self._is_quantised(name)), default=0)

    def _frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, each) for name, each in self.model.named_parameters() if not each.requires_grad)
        yield from self.model.named_buffers()

    def _is_quantised(self, name: str) -> bool:
        layer, _, kind = name.removeprefix("base_model.model.").rpartition(".")
        return kind == "weight" and layer.removesuffix(".base_layer") in self.quantised

    def _bytes(self, name: str, tensor: torch.Tensor) -> int:
        """Return what a tensor takes with its scales (bitsandbytes 0.50, `functional.py`)."""
        if not self._is_quantised(name):
            return int(tensor.nbytes)
        if self.bits == 8:
            return int(tensor.numel() + 4 * tensor.shape[0])  # a float32 a row
        # A scale for 64 numbers: a float32, or 8 bits and a float32 for 256 of those.
        scales = tensor.numel() / 64 * (1 + 4 / 256 if self.nested else 4)
        return int(tensor.numel() / 2 + scales)


def read_structure(config: Config, files: str) -> Any:
    """Return the model's `PretrainedConfig`.

    Args:
        config: The run.
        files: The model's folder or hub id (from `model_files`).
    """
    from transformers import AutoConfig

    model = config.model
    remote = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    with told_if_it_needs_code(model):
        structure = AutoConfig.from_pretrained(files, **remote)
    structure.use_cache = False
    return structure


def with_layers(structure: Any, layers: int) -> Any:
    """Return the structure of the same model with its first layers alone."""
    shorter = copy.deepcopy(structure)
    text = shorter.get_text_config()
    whole = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == whole:  # layer_types, no_rope_layers, ...
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return shorter


def period(structure: Any) -> int:
    """Return after how many layers a model repeats itself."""
    text = structure.get_text_config()
    whole = text.num_hidden_layers
    lists = [each for each in vars(text).values() if isinstance(each, list) and len(each) == whole]
    return next(
        size for size in range(1, whole + 1) if all(each[n] == each[n % size] for each in lists for n in range(whole))
    )


def build_twin(config: Config, structure: Any, precision: Precision, start: Path | None) -> Twin:
    """Return the structure of the policy that `load_policy` would load.

    Args:
        config: The run.
        structure: The model's, whole or with fewer layers.
        precision: What it is trained in.
        start: The folder of the adapter to go on from, if any.

    Raises:
        UserError: If `lora.target_modules` matches no layer, or `quant.llm_int8_skip_modules` does not fit the model.
    """
    from transformers import AutoModelForCausalLM

    model = config.model
    wanted = model.dtype or precision.dtype
    dtype = structure.dtype or torch.float32 if wanted == "auto" else getattr(torch, wanted)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(structure, dtype=dtype, trust_remote_code=model.trust_remote_code)
        base.name_or_path = base.config._name_or_path = model.pretrained_model_name_or_path  # as PEFT has it noted
        kept = config.quant.llm_int8_skip_modules
        quantised = frozenset(quantised_layers(base, kept) if config.quant.target else ())
        policy = _adapted(base, config, start)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _make_fake(policy, mode)
    if quantised and precision.bf16:
        with mode:
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does
    bits = 8 if config.quant.load_in_8bit else 4 if config.quant.load_in_4bit else None
    return Twin(policy, mode, quantised, bits, config.quant.bnb_4bit_use_double_quant)


def _make_fake(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Put tensors that say they are on a processor in the place of those that are nowhere."""
    made: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    fresh = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    made[id(parameter)] = torch.nn.Parameter(fresh, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _adapted(base: Any, config: Config, start: Path | None) -> Any:
    from peft import LoraConfig, get_peft_model

    if start is not None:
        lora = LoraConfig.from_pretrained(str(start))
        lora.inference_mode = False
    else:
        lora = lora_config(base, config.lora)
    lora.init_lora_weights = True  # its shape is the same, and others compute with the weights
    try:
        return get_peft_model(base, lora, low_cpu_mem_usage=True)
    except ValueError as error:
        raise refused_layers(base, error) from error


@contextmanager
def computing(twin: Twin, precision: Precision) -> Iterator[None]:
    """Compute within the block as the trainer does: in fake tensors, under its autocast."""
    half = precision.dtype != "float32"
    with twin.mode, torch.autocast("cpu", getattr(torch, precision.dtype) if half else torch.bfloat16, enabled=half):
        yield
