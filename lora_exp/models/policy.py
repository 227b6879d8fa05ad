"""The policy: a base, quantised or not, with the adapter that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lora_exp.config import Config, LoraConfig, ModelConfig, QuantConfig
from lora_exp.errors import Problem, UserError
from lora_exp.models.precision import Precision, choose_precision
from lora_exp.models.shared import SHARED_BASE, base_key, checksum
from lora_exp.models.targets import choose_targets, linear_layers, uses_conv1d
from lora_exp.training.integrity import staged

Reference = Literal["adapter off", "start adapter"]
"""What a reference model is: the base alone, or a frozen copy of the adapter as it was at the start."""


WRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `lora.init_lora_weights` with which PEFT 0.21 changes the base weights (`tuners/lora/layer.py`)."""


@dataclass(frozen=True)
class Policy:
    """A PEFT model and what a run says about it.

    Args:
        model: The `peft.PeftModel`; its adapter is called `default`.
        precision: What it is trained in, and why.
        reference: How a recipe that needs a reference gets one without a second base.
        target_modules: The layers that carry an adapter.
        trainable_parameters: Numbers that training moves.
        total_parameters: All of them, the base's counted unquantised.
        notes: What the user should know of how it came about.
        initial: The adapter as it was at the start, where it took a part of the base into itself (PiSSA).
        start: The folder of the adapter that the reference keeps, None where it is the base alone.
        base: What the base is: its name, the hub's commit where it comes from there, a digest of the weights as they
            were loaded.
    """

    model: Any
    precision: Precision
    reference: Reference
    target_modules: list[str]
    trainable_parameters: int
    total_parameters: int
    notes: tuple[str, ...] = ()
    initial: Path | None = None
    start: Path | None = None
    base: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def device(self) -> Any:
        """The torch device that it is on."""
        return self.model.device

    @property
    def starts_at_reference(self) -> bool:
        """Whether the policy computes what its reference does before the first step, but for what it drops."""
        return self.reference == "start adapter" or self.model.peft_config["default"].init_lora_weights is not False


def load_policy(config: Config, files: str, start: Path | None, scratch: Path, device: Any) -> Policy:
    """Load the base and attach its adapter, drawn from the run's seed.

    Args:
        config: The run.
        files: What `from_pretrained` reads (from `model_files`).
        start: A trained adapter's folder (from `adapter_dir`), or None for a new one.
        scratch: Where an initial adapter is kept if saving will need it.
        device: The torch device.
    """
    from transformers import set_seed

    precision = choose_precision(config.trainer, device)

    def load() -> Any:
        return load_base(config.model, config.quant, precision, device, files)

    if writes_into_base(config.lora):
        SHARED_BASE.forget()
        base = load()
        digest = checksum(base)
    else:
        key = base_key(config.model, config.quant, config.model.dtype or precision.dtype, device, files)
        base = SHARED_BASE.get(key, load)
        digest = SHARED_BASE.digest
    facts = {
        "name": config.model.pretrained_model_name_or_path,
        "revision": getattr(base.config, "_commit_hash", None),
        "xxh3": digest,
    }
    # After loading: the adapter is the same whether or not the base was there already.
    set_seed(config.seed)
    return replace(attach_adapter(base, config, precision, start, scratch), base=facts)


def writes_into_base(lora: LoraConfig) -> bool:
    """Whether the adapter starts by moving a part of the base into itself.

    With it off, the base is then no longer the model that one started from.
    """
    return isinstance(lora.init_lora_weights, str) and lora.init_lora_weights.startswith(WRITING_INITS)


def load_tokenizer(config: ModelConfig, files: str) -> Any:
    """Load the model's tokenizer; it pads on the right with its pad token, or the end token where it has none."""
    from transformers import AutoTokenizer

    with told_if_it_needs_code(config):
        tokenizer = AutoTokenizer.from_pretrained(
            files, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_base(config: ModelConfig, quant: QuantConfig, precision: Precision, device: Any, files: str) -> Any:
    """Load the base weights onto the device, quantised where `quant` says so.

    The model remembers the name in the config, not the folder it was read from, so that the adapter's
    `base_model_name_or_path` means the same on other machines.

    Raises:
        UserError: If files are missing, or it cannot be loaded without code that nobody trusted.
    """
    from transformers import AutoModelForCausalLM

    kwargs: dict[str, Any] = {"dtype": config.dtype or precision.dtype}
    if config.attn_implementation is not None:
        kwargs["attn_implementation"] = config.attn_implementation
    if quant.target is not None:
        kwargs["quantization_config"] = _quantization_config(quant, precision)
    try:
        with told_if_it_needs_code(config):
            base = AutoModelForCausalLM.from_pretrained(
                files,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,  # any other format is a pickle, which runs code as it is read
                device_map={"": device},
                **kwargs,
            )
    except OSError as error:
        raise UserError("the model cannot be loaded", [_unreadable(config, error)]) from error
    base.name_or_path = base.config._name_or_path = config.pretrained_model_name_or_path
    base.config.use_cache = False
    if quant.target is not None:
        from lora_exp.models.bitsandbytes import multiply_in_compute_dtype

        multiply_in_compute_dtype(base)
        _let_go_of_files(base)
    return base


def _let_go_of_files(base: Any) -> None:
    """Give what a quantised base keeps as it was stored memory of its own.

    A norm that is used as it lies in a safetensors file keeps the whole file in memory, which the quantised layers
    were read from and need no more.
    """
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _unreadable(config: ModelConfig, error: OSError) -> Problem:
    key, what = "model.pretrained_model_name_or_path", " ".join(str(error).split())
    if "use_safetensors" not in what:
        return Problem(key, what)
    what = (
        f"{config.pretrained_model_name_or_path} has no safetensors file, and a pickle may run any code as it is read"
    )
    return Problem(key, what, "if you trust its maker, convert a copy to safetensors and name its folder")


@contextmanager
def told_if_it_needs_code(config: ModelConfig) -> Iterator[None]:
    """Turn what transformers says of a model that brings its own code into an error with its mend.

    Raises:
        UserError: If it needs code that nobody trusted.
    """
    try:
        yield
    except ValueError as error:
        if config.trust_remote_code or "trust_remote_code" not in str(error):
            raise
        what = f"{config.pretrained_model_name_or_path} runs code of its own, which nobody here has trusted yet"
        mend = "read that code, then model.trust_remote_code=true, with model.revision=<the commit that you read>"
        raise UserError("the model cannot be loaded", [Problem("model.trust_remote_code", what, mend)]) from error


def _quantization_config(quant: QuantConfig, precision: Precision) -> Any:
    from hydra.utils import instantiate

    arguments = quant.model_dump(by_alias=True, exclude_unset=True)
    if "bnb_4bit_compute_dtype" in arguments:
        arguments["bnb_4bit_compute_dtype"] = quant.bnb_4bit_compute_dtype or precision.dtype
    return instantiate(arguments, _convert_="all")


def attach_adapter(base: Any, config: Config, precision: Precision, start: Path | None, scratch: Path) -> Policy:
    """Put a new adapter on the base, or the trained one in `start` (from `adapter_dir`).

    Args:
        base: From `load_base`.
        config: The run.
        precision: What the base was loaded in.
        start: A trained adapter's folder, or None for a new one.
        scratch: Where an initial adapter is kept if saving will need it.

    Raises:
        UserError: If `lora.target_modules` matches no layer, or one that PEFT refuses.
    """
    if start is not None:
        return _with_trained_adapter(base, config.lora, precision, start)
    from peft import get_peft_model

    lora = lora_config(base, config.lora)
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        SHARED_BASE.forget()  # some of its layers may carry an adapter already
        raise refused_layers(base, error) from error
    if not writes_into_base(config.lora):
        return _policy(model, precision, "adapter off")
    initial = scratch / "initial_adapter"
    policy = _policy(model, precision, "start adapter", initial=initial, start=initial)
    lora = model.peft_config["default"]
    # PEFT converts on saving only if the initial adapter does not ask for PiSSA itself.
    wanted, lora.init_lora_weights = lora.init_lora_weights, True
    model.save_pretrained(str(policy.initial))
    lora.init_lora_weights = wanted
    return policy


def refused_layers(base: Any, error: ValueError) -> Exception:
    """Return what tells the user which layers are left, or the error itself where PEFT does not name one.

    PEFT 0.21 refuses some layers of state space models (`tuners/tuners_utils.py`), whose kernels read the bare weights.
    """
    names = {name.removesuffix(".base_layer").rpartition(".")[2] for name in linear_layers(base) if "lora_" not in name}
    left = sorted(name for name in names if f"'{name}'" not in str(error))
    if len(left) == len(names):
        return error
    problem = Problem("lora.target_modules", str(error), f"lora.target_modules=[{','.join(left)}] takes the others")
    return UserError("PEFT refuses to adapt a layer", [problem])


def lora_config(base: Any, lora: LoraConfig) -> Any:
    """Return the `peft.LoraConfig` of a new adapter on a model.

    Raises:
        UserError: If `lora.target_modules` matches no layer.
    """
    from hydra.utils import instantiate

    targets = choose_targets(base, lora.target_modules)
    arguments = lora.model_dump(by_alias=True, exclude_unset=True) | {"target_modules": targets}
    covered = [name for name in linear_layers(base) if any(name.endswith(target) for target in targets)]
    if uses_conv1d(base, covered):
        arguments["fan_in_fan_out"] = True
    return instantiate(arguments, task_type="CAUSAL_LM", _convert_="all")


def _with_trained_adapter(base: Any, lora: LoraConfig, precision: Precision, start: Path) -> Policy:
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(base, start, is_trainable=True)
    except (RuntimeError, ValueError) as error:
        problem = Problem("model.adapter", f"{start} does not fit this model: {str(error).splitlines()[0]}")
        raise UserError("the adapter cannot be loaded", [problem]) from error
    own = model.peft_config["default"]
    ignored = [
        f"lora.{name}={value}"
        for name, value in (("r", lora.r), ("lora_alpha", lora.lora_alpha), ("use_dora", lora.use_dora))
        if getattr(own, name) != value
    ]
    note = (f"the adapter brings its own shape (r={own.r}); not used: {' '.join(ignored)}",) if ignored else ()
    return _policy(model, precision, "start adapter", note, start=start)


def _policy(
    model: Any,
    precision: Precision,
    reference: Reference,
    notes: tuple[str, ...] = (),
    initial: Path | None = None,
    start: Path | None = None,
) -> Policy:
    # Only the trained adapter is written, in checkpoints too: a reference's copy comes from the start again. No
    # embedding trains, and PEFT would ask the hub about it at every save.
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"], save_embedding_layers=False)
    trainable, total = model.get_nb_trainable_parameters()
    targets = model.peft_config["default"].target_modules
    targets = [targets] if isinstance(targets, str) else sorted(targets)
    return Policy(model, precision, reference, targets, trainable, total, notes, initial, start)


def save_adapter(policy: Policy, tokenizer: Any, folder: Path) -> None:
    """Write the adapter (safetensors) and its tokenizer, whole or not at all.

    A PiSSA adapter is written as the plain LoRA (of twice the rank) that does the same to the untouched base.
    """
    convert = {} if policy.initial is None else {"path_initial_model_for_weight_conversion": str(policy.initial)}
    with staged(folder, sealed=False) as part:
        policy.model.save_pretrained(str(part), **convert)
        tokenizer.save_pretrained(str(part))
