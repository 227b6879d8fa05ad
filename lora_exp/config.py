"""The schema: a typed, frozen section per group, and the rules between their keys.

Hydra composes the YAML files; `lora_exp.validation` turns the result into a `Config`. The sections are pydantic models
in strict mode (no "512" for 512) that forbid unknown keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from lora_exp.library_fields import library_values, one_of
from lora_exp.rules import Rule

MISSING = "???"
CONF_DIR = next(
    folder
    for folder in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf")
    if (folder / "config.yaml").is_file()
)
"""`conf/`: beside the package in a clone, inside it in a wheel."""

SIZE = "a size with its unit, such as 2GB or 500MB"


def _with_unit(value: Any, parse: ValidatorFunctionWrapHandler) -> Any:
    try:
        size = parse(value)
    except ValueError as error:
        raise ValueError(SIZE) from error
    if size < 0:
        raise ValueError(SIZE)
    return size


Size = Annotated[ByteSize, WrapValidator(_with_unit)]
"""Bytes, as a number or with a unit."""


class Section(BaseModel):
    """A group's keys. `rules` are the relations that hold between them and other groups' keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)
    rules: ClassVar[tuple[Rule, ...]] = ()
    unused: ClassVar[tuple[Rule, ...]] = ()
    """Keys without effect beside others: no mistake in a run, but none that a sweep may vary."""
    library_class: ClassVar[str | None] = None
    """Who takes unlisted keys (`+trainer.name=value`), if it knows them."""
    package: ClassVar[tuple[str, str] | None] = None
    """A module that does the work and is not always installed, and the extra of this package that brings it."""
    set_elsewhere: ClassVar[Mapping[str, str]] = {}
    """Fields of the library class that are not given here, and what is given instead."""


class ModelConfig(Section):
    """conf/model: which weights to start from."""

    pretrained_model_name_or_path: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None
    fetch: dict[str, str] | None = None
    embedded: dict[str, Any] | None = None


def _layer_patterns(value: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise ValueError("names of layers, such as [lm_head,q_proj]")
    for each in value:
        try:
            re.compile(f"(?:{each})")  # as transformers puts it into its own
        except re.error as error:
            raise ValueError(f"names or regular expressions; {each!r} is none: {error}") from error
    return value


class QuantConfig(Section):
    """conf/quant: the arguments of transformers.BitsAndBytesConfig, or nothing."""

    model_config = ConfigDict(extra="allow")
    library_class = "transformers.BitsAndBytesConfig"
    set_elsewhere = {
        "llm_int8_threshold": "nothing: 8-bit weights are multiplied in the compute dtype, since a row's numbers would "
        "depend on the rows beside it if columns with outliers were taken apart",
        "llm_int8_has_fp16_weight": "nothing: the base is frozen, and its weights stay in 8 bits",
    }
    target: str | None = Field(None, alias="_target_")
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    llm_int8_skip_modules: Annotated[list[str], BeforeValidator(_layer_patterns)] | None = None

    unused = tuple(
        Rule(
            (f"quant.{key}", "quant.load_in_4bit"),
            lambda _, used: used is not True,
            "only a 4-bit base uses it",
            "quant=4bit",
        )
        for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
    )


def _init_of_lora(value: str) -> str:
    """`pissa_niter_[number of iters]` is how PEFT writes that a number follows."""
    if re.fullmatch(r"pissa_niter_[1-9]\d*", value):
        return value
    return one_of(library_values("peft.LoraConfig.init_lora_weights"), value)


def _some_modules(value: list[str] | str) -> list[str] | str:
    if not value:
        raise ValueError("auto, or names of layers such as [q_proj,v_proj]")
    return value


LoraInit = Annotated[str, AfterValidator(_init_of_lora)]
Optimizer = Annotated[str, AfterValidator(lambda value: one_of(library_values("transformers.OptimizerNames"), value))]
Scheduler = Annotated[str, AfterValidator(lambda value: one_of(library_values("transformers.SchedulerType"), value))]


class LoraConfig(Section):
    """conf/lora: the arguments of peft.LoraConfig."""

    model_config = ConfigDict(extra="allow")
    library_class = "peft.LoraConfig"
    target: str = Field("peft.LoraConfig", alias="_target_")
    r: int = Field(gt=0)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(ge=0, lt=1)
    target_modules: Annotated[list[str] | str, AfterValidator(_some_modules)]
    bias: Literal["none", "all", "lora_only"]
    use_dora: bool
    use_rslora: bool
    init_lora_weights: bool | LoraInit

    rules = (
        Rule(
            ("lora.init_lora_weights", "quant._target_"),
            lambda init, quant: isinstance(init, str) and init.startswith("pissa") and quant is not None,
            "PiSSA writes into the base weights, which cannot be done once they are quantised",
            "use quant=none, or another lora= option",
        ),
    )


class DataConfig(Section):
    """conf/data: where rows come from."""

    splits_dir: str | None = None
    train_file: str | None = None
    val_file: str | None = None
    path: str | None = None
    name: str | None = None
    data_files: dict[str, str] | None = None
    train_split: str | None = None
    val_split: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    chat_template: Literal["auto"] | bool = "auto"
    chat_template_path: str | None = None
    max_dropped_share: float | None = Field(0.05, ge=0, le=1)
    max_cut_share: float | None = Field(None, ge=0, le=1)
    on_leak: Literal["warn", "error", "ignore"] = "warn"
    cache_size: Size = ByteSize(20 * 10**9)

    rules = (
        Rule(
            ("data.splits_dir", "data.train_file", "data.path"),
            lambda *sources: not any(sources),
            "is not set, and neither is data.train_file: there is nothing to train on",
            "name the folder with your rows: data.splits_dir=my_rows",
        ),
        Rule(
            ("data.chat_template_path", "data.chat_template"),
            lambda path, used: path is not None and used is False,
            "{0} has no effect with data.chat_template=false",
            "data.chat_template=auto",
        ),
    )


class TrainerConfig(Section):
    """conf/trainer: fields of transformers.TrainingArguments; others can be added with `+trainer.name=value`."""

    model_config = ConfigDict(extra="allow")
    library_class = "transformers.TrainingArguments"
    set_elsewhere = {
        "output_dir": "output_dir=...",
        "seed": "seed=...",
        "full_determinism": "deterministic=true",
        "report_to": "tracker=...",
        "run_name": "tracker.name=...",
        "resume_from_checkpoint": "resume=<run folder>",
        "disable_tqdm": "nothing: the bar shows on terminals only",
        "enable_jit_checkpoint": "trainer.grace_seconds=...: a signal has a checkpoint written",
        "logging_nan_inf_filter": "nothing: a loss that is no number ends the run",
    }
    own_keys: ClassVar[set[str]] = {"grace_seconds"}
    """Keys that are ours and no field of TrainingArguments."""
    per_device_train_batch_size: int = Field(gt=0)
    per_device_eval_batch_size: int = Field(gt=0)
    gradient_accumulation_steps: int = Field(gt=0)
    num_train_epochs: float = Field(gt=0)
    max_steps: int
    learning_rate: float = Field(ge=0)
    lr_scheduler_type: Scheduler
    warmup_steps: float = Field(ge=0)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(ge=0)
    optim: Optimizer
    gradient_checkpointing: bool | Literal["auto"]
    bf16: bool | Literal["auto"]
    fp16: bool
    use_cpu: bool
    logging_steps: float = Field(gt=0)
    logging_first_step: bool
    eval_strategy: Literal["no", "steps", "epoch"]
    eval_steps: float | None = Field(gt=0)
    eval_on_start: bool
    save_strategy: Literal["no", "steps", "epoch", "best"]
    save_steps: float = Field(gt=0)
    save_total_limit: int | None = Field(gt=0)
    load_best_model_at_end: bool
    metric_for_best_model: str | None
    greater_is_better: bool | None
    auto_find_batch_size: bool = False
    grace_seconds: float = Field(25, gt=0)

    rules = (
        Rule(
            ("trainer.bf16", "trainer.fp16"),
            lambda bf16, fp16: bf16 is True and fp16 is True,
            "bf16 and fp16 cannot both be on",
            "keep one: trainer.bf16=false or trainer.fp16=false",
        ),
        Rule(
            ("trainer.max_steps",),
            lambda steps: steps == 0 or steps < -1,
            "{0} steps cannot be trained",
            "give a positive number, or -1 to go by trainer.num_train_epochs",
        ),
        Rule(
            ("trainer.eval_strategy", "trainer.eval_steps"),
            lambda strategy, steps: strategy == "steps" and steps is None,
            "evaluation by steps without a number of steps",
            "trainer.eval_steps=50, or trainer.eval_strategy=epoch",
        ),
        Rule(
            ("trainer.load_best_model_at_end", "trainer.eval_strategy"),
            lambda best, evaluate: best is True and evaluate == "no",
            "the best model cannot be chosen without evaluation",
            "trainer.eval_strategy=epoch, or trainer.load_best_model_at_end=false",
        ),
        Rule(
            ("trainer.load_best_model_at_end", "trainer.save_strategy"),
            lambda best, save: best is True and save == "no",
            "the best model cannot be loaded if none is saved",
            "trainer.save_strategy=epoch, or trainer.load_best_model_at_end=false",
        ),
        Rule(
            ("trainer.load_best_model_at_end", "trainer.save_strategy", "trainer.eval_strategy"),
            lambda best, save, evaluate: (
                best is True and save in ("steps", "epoch") and evaluate in ("steps", "epoch") and save != evaluate
            ),
            "checkpoints are saved by {1} but evaluated by {2}, so the best one would not be on disk",
            "give trainer.save_strategy and trainer.eval_strategy the same value",
        ),
        Rule(
            (
                "trainer.save_steps",
                "trainer.eval_steps",
                "trainer.load_best_model_at_end",
                "trainer.save_strategy",
                "trainer.eval_strategy",
            ),
            lambda save, evaluate, best, save_by, evaluate_by: (
                best is True and save_by == evaluate_by == "steps" and not _is_multiple(save, evaluate)
            ),
            "with load_best_model_at_end, save_steps ({0}) must be a multiple of eval_steps ({1})",
            "make trainer.save_steps a round multiple of trainer.eval_steps",
        ),
    )

    unused = (
        Rule(
            ("trainer.num_train_epochs", "trainer.max_steps"),
            lambda _, steps: steps > 0,
            "trainer.max_steps={1} replaces it",
            "trainer.max_steps=-1",
        ),
        Rule(
            ("trainer.eval_steps", "trainer.eval_strategy"),
            lambda _, strategy: strategy != "steps",
            "trainer.eval_strategy={1} does not use it",
            "trainer.eval_strategy=steps",
        ),
        Rule(
            ("trainer.save_steps", "trainer.save_strategy"),
            lambda _, strategy: strategy != "steps",
            "trainer.save_strategy={1} does not use it",
            "trainer.save_strategy=steps",
        ),
    )


def _is_multiple(save_steps: float, eval_steps: float | None) -> bool:
    """Whether every save falls on an evaluation; shares of the run (below 1) are compared with shares only."""
    if eval_steps is None:
        return True
    if (save_steps < 1) != (eval_steps < 1):
        return False
    return abs(save_steps / eval_steps - round(save_steps / eval_steps)) < 1e-9


class SamplesConfig(Section):
    """Answers to fixed prompts, before and after training."""

    num_prompts: int = Field(ge=0)
    max_new_tokens: int = Field(gt=0)


EVAL_SOURCES = ("data.val_file", "data.splits_dir", "data.val_split", "data.train_file", "data.path")


def _trains_only(val_file: str | None, splits_dir: str | None, val_split: str | None, *train: str | None) -> bool:
    """Whether there are rows to train on and none to evaluate on; without any, another rule speaks."""
    return any(train) and not (val_file or splits_dir or val_split)


class StoreConfig(Section):
    """Where reference log-probabilities are kept between runs."""

    path: str | None
    max_size: Size

    @field_validator("max_size")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if not value:
            raise ValueError(SIZE)
        return value


def _folder_name(name: str) -> str:
    if len(name) > 100 or not re.fullmatch(r"\w[\w.,=+-]*", name):
        raise ValueError("a name for a folder: letters, digits and _ . , = + -, at most 100")
    return name


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps|xpu", name):
        raise ValueError("auto, cpu, cuda, cuda:1, mps or xpu")
    return name


class SweepConfig(Section):
    """What holds for a multirun as a whole."""

    name: Annotated[str, AfterValidator(_folder_name)] | None = Field(min_length=1)
    axes: list[str]
    variant: str | None
    seeds: int | None = Field(gt=0)
    on_change: Literal["refuse", "extend"]
    fail_fast: bool
    confirm: bool


Way = Literal["minimize", "maximize"]


class Config(Section):
    """One whole run, as composed. `recipe`, `engine` and `tracker` are the classes that their YAML files name."""

    recipe: Any
    model: ModelConfig
    quant: QuantConfig
    lora: LoraConfig
    data: DataConfig
    trainer: TrainerConfig
    engine: Any
    tracker: Any
    store: StoreConfig
    sweep: SweepConfig
    samples: SamplesConfig
    seed: int = Field(ge=0)
    device: Annotated[str, AfterValidator(_device)] = "auto"
    deterministic: bool = False
    objective: str | Annotated[list[str], Field(min_length=1)] | None
    direction: Way | list[Way] | None
    output_dir: str = Field(min_length=1)
    resume: str | None
    dry_run: bool = False

    rules = (
        Rule(
            ("device", "trainer.use_cpu"),
            lambda device, cpu: cpu is True and device not in ("auto", "cpu"),
            "is {0}, and trainer.use_cpu=true takes the CPU",
            "trainer.use_cpu=false, or device=cpu",
        ),
        Rule(
            ("trainer.fp16", "device", "trainer.use_cpu"),
            lambda fp16, device, cpu: fp16 is True and (device == "cpu" or cpu is True),
            "fp16 training needs a GPU",
            "trainer.fp16=false trainer.bf16=auto",
        ),
        Rule(
            ("trainer.eval_strategy", *EVAL_SOURCES),
            lambda strategy, *sources: strategy in ("steps", "epoch") and _trains_only(*sources),
            "evaluation by {0}, but there is no evaluation data",
            "name some with data.val_file=..., or set trainer.eval_strategy=no",
        ),
        Rule(
            ("trainer.eval_on_start", *EVAL_SOURCES),
            lambda on_start, *sources: on_start is True and _trains_only(*sources),
            "evaluation at the start, but there is no evaluation data",
            "name some with data.val_file=..., or set trainer.eval_on_start=false",
        ),
        Rule(
            ("objective", *EVAL_SOURCES),
            lambda objective, *sources: "eval_" in str(objective) and _trains_only(*sources),
            "{0} is a number of an evaluation, but there is no evaluation data",
            "name some with data.val_file=...",
        ),
        Rule(
            ("direction", "objective"),
            lambda direction, objective: direction is not None and _length(direction) != _length(objective),
            "{0} is not one for each objective",
            "give as many directions as objectives, or leave them out: they are known from the names",
        ),
    )

    @property
    def objectives(self) -> list[str]:
        """What trials are compared by; the first one ranks them."""
        if self.objective is None:
            return [self.recipe.objective]
        return [self.objective] if isinstance(self.objective, str) else self.objective


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 1
