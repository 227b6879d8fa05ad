"""The packed engine computes what TRL's own forward computes: losses, logged numbers, gradients, whole runs.

How close two computations can come is set by TRL's head, which makes float32 numbers of hidden states in any format: a
log-probability near -6 is known to 5e-7, an answer's sum near -100 to 8e-6. So a float64 model leaves only that
rounding; it stands out against every real error, which moves a gradient by a thousandth or more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_exp.config import CONF_DIR
from lora_exp.engine import layout
from lora_exp.engine.identity import Identity
from lora_exp.engine.reference import add_reference
from lora_exp.engine.store import ReferenceStore
from lora_exp.engine.training import PackedTraining, Plan
from lora_exp.recipes.dpo import F_DIVERGENCES, LOSS_TYPES
from tests.engines import (
    ALL_AT_ONCE,
    FEW,
    PAIR_AT_A_TIME,
    REFERENCE,
    SOME_AT_A_TIME,
    Engines,
    Step,
    adapter,
    batches,
    build_engines,
    distance,
    disturb,
    step,
    told,
)
from tests.few import SMALL, SYSTEM, Row, pairs, write_rows
from tests.runs import build_trainer


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread, and lose much where other programs want its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engines]:
    """Build both engines over `pairs`, with a store of the module's own."""
    folder = tmp_path_factory.mktemp("engines")
    shared = [*SMALL, *write_rows(folder / "rows", pairs()), f"store.path={folder / 'store.sqlite3'}"]

    def engines(*overrides: str, disturbed: bool = True) -> Engines:
        return build_engines(tmp_path_factory.mktemp("run"), [*shared, *overrides], disturbed)

    return engines


# One optimiser step, by loss.

FLIPPED = {"robust": 0.1, "exo_pair": 0.001}
"""The share of flipped labels for the losses that need one."""

LOSSES = {
    **{
        name: ["recipe=dpo", f"recipe.loss_type={name}", f"recipe.label_smoothing={FLIPPED.get(name, 0.0)}"]
        for name in LOSS_TYPES
    },
    "flipped aot": ["recipe=dpo", "recipe.loss_type=aot", "recipe.label_smoothing=0.2"],
    "weighted sigmoid and sft": ["recipe=dpo", "recipe.loss_type=[sigmoid,sft]", "recipe.loss_weights=[1.0,0.2]"],
    "weighted sigmoid and aot": ["recipe=dpo", "recipe.loss_type=[sigmoid,aot]", "recipe.loss_weights=[1.0,0.5]"],
    "wpo": ["recipe=dpo", "recipe.use_weighting=true"],
    "ld": ["recipe=dpo", "recipe.ld_alpha=0.5"],
    **{name: ["recipe=dpo", f"recipe.f_divergence_type={name}"] for name in F_DIVERGENCES},
    "nll": ["recipe=sft"],
    "dft": ["recipe=sft", "recipe.loss_type=dft"],
}

EVALUATED = {
    f"eval_{name}"
    for name in ("loss", "entropy", "mean_token_accuracy", "logps/chosen", "logps/rejected", "logits/chosen")
} | {f"eval_rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
"""What an evaluation logs beside the time it took."""

IN_EACH_STEP = ("sigmoid", "ipo", "ld")
"""Losses that are tried once more with a reference that both engines compute in each step."""


@pytest.fixture(
    scope="module",
    params=[*((name, True) for name in LOSSES), *((name, False) for name in IN_EACH_STEP)],
    ids=lambda case: f"{case[0]}, {'stored' if case[1] else 'own'} reference",
)
def engines(request: pytest.FixtureRequest, build: Callable[..., Engines]) -> Engines:
    name, stored = request.param
    engines = build(*LOSSES[name])
    if "recipe=dpo" in LOSSES[name]:
        if stored:
            engines.share_reference()
        else:
            engines.forget_reference()
    return engines


LEAST = 1e-2
"""Smaller gradients are compared as if they were of this size: of like answers nothing but rounding is left."""


def assert_same(packed: Step, padded: Step, numbers: float, gradient: float) -> None:
    """Compare loss and metrics, each as a share of its size or of 1, and gradients as a share of their norm."""
    assert packed.loss == pytest.approx(padded.loss, rel=numbers, abs=numbers)
    assert packed.metrics == pytest.approx(padded.metrics, rel=numbers, abs=numbers)
    assert packed.gradients.keys() == padded.gradients.keys()
    assert (packed.gradient - padded.gradient).norm() <= gradient * max(padded.gradient.norm(), LEAST)


@pytest.mark.parametrize(
    ("dtype", "numbers", "gradient"), [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-7, 1e-6)], ids=str
)
def test_a_step_is_trls(engines: Engines, dtype: torch.dtype, numbers: float, gradient: float) -> None:
    """In float64 the gradients lie within 3e-6 of their norm: what TRL's float32 head leaves (see above)."""
    engines.to(dtype)
    padded = engines.padded_step()
    assert padded.gradient.norm() > 0
    for budget in (PAIR_AT_A_TIME, SOME_AT_A_TIME, ALL_AT_ONCE):
        assert_same(engines.packed_step(budget), padded, numbers, gradient)


def test_an_evaluation_is_trls(engines: Engines) -> None:
    engines.to(torch.float64).packed.tokens_per_microbatch = SOME_AT_A_TIME
    padded, packed = (
        {k: v for k, v in each.evaluate().items() if k in EVALUATED} for each in (engines.padded, engines.packed)
    )
    assert "eval_loss" in padded
    assert packed == pytest.approx(padded, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("ld_alpha", ["null", "0.5"])
def test_the_stored_reference_is_trls(build: Callable[..., Engines], ld_alpha: str) -> None:
    engines = build("recipe=dpo", f"recipe.ld_alpha={ld_alpha}")
    for split in ("train_dataset", "eval_dataset"):
        own = getattr(engines.packed, split)
        batch = engines.padded.data_collator(list(getattr(engines.padded, split)))
        computed = engines.padded.compute_ref_log_probs(engines.padded.model, batch)
        for name, values in zip(REFERENCE, computed, strict=True):
            assert own[name] == pytest.approx(values.tolist(), rel=1e-6)


def test_the_reference_is_not_what_the_adapter_has_learned(build: Callable[..., Engines], tmp_path: Path) -> None:
    trainer = build("recipe=dpo").packed
    at_the_start = {name: list(trainer.train_dataset[name]) for name in REFERENCE}
    for split in ("train_dataset", "eval_dataset"):
        setattr(trainer, split, getattr(trainer, split).remove_columns(REFERENCE))
    with ReferenceStore(tmp_path / "store.sqlite3", 10**6) as store:
        assert add_reference(trainer, store, Identity("tests", {})) == {"computed": 13, "reused": 0}
    for name, values in at_the_start.items():
        assert trainer.train_dataset[name] == pytest.approx(values, rel=1e-6)


# Any batch.

VOCABULARY = 250
"""Token ids below it are ordinary ones."""

LONG = layout.DENSE + 60


@dataclass(frozen=True)
class Drawn:
    """Preference pairs as (prompt, chosen, rejected) token ids, batch by batch, and a budget."""

    batches: list[list[tuple[list[int], list[int], list[int]]]]
    budget: int

    def collated(self, trainer: Any) -> list[dict[str, torch.Tensor]]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [trainer.data_collator([dict(zip(names, row, strict=True)) for row in batch]) for batch in self.batches]


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@st.composite
def preferences(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Draw a pair: unlike answers, or ones that share a start of any length; the prompt may be empty.

    Prompts begin with more or less of one of two texts, so that pairs share it.
    """
    seeds = st.integers(0, 9)
    system = ids(draw(st.integers(0, 20)), draw(st.integers(10, 11)))
    prompt = system + ids(draw(st.integers(0, 20)), draw(seeds))
    shared = ids(draw(st.integers(0, 8)), draw(seeds))
    chosen, rejected = (shared + ids(draw(st.integers(0 if shared else 1, 8)), draw(seeds)) for _ in range(2))
    return prompt, chosen, rejected


LONG_ROW = (ids(20, 0), ids(LONG, 1), ids(LONG - 50, 2))
LONG_PROMPT = (ids(LONG, 3), ids(2, 4), ids(140, 5))
SHORTEST = ([], [7], [8])
LAST_TOKEN = (ids(5, 6), [*ids(9, 7), 1], [*ids(9, 7), 2])
ONE_STARTS_THE_OTHER = (ids(5, 8), ids(9, 9), ids(9, 9)[:4])
TEXT = ids(30, 12)
GOES_ON = [(TEXT + ids(length, 13), ids(6, 14), ids(9, 15)) for length in (0, 5, 40, LONG)]
"""Prompts of which each starts the next."""


@pytest.fixture(scope="module")
def shallow(build: Callable[..., Engines]) -> Engines:
    """Both engines on one float64 layer; they compute the reference in each step."""
    engines = build("recipe=dpo", "recipe.max_length=1000", "model.embedded.config.num_hidden_layers=1")
    engines.forget_reference()
    return engines.to(torch.float64)


def log_probs(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-probabilities of the scored tokens [2 N, L - 1] from the plain logits, in float64."""
    ids, scored = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    logits = trainer.model.get_base_model()(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    every = torch.log_softmax(logits[:, :-1].double(), -1).gather(2, ids[:, 1:, None])[..., 0]
    return every.masked_fill(~scored, 0.0)


@settings(max_examples=20, deadline=None)
@given(
    st.builds(
        Drawn,
        st.lists(st.lists(preferences(), min_size=1, max_size=4), min_size=1, max_size=3),
        st.integers(1, 120),
    )
)
@example(Drawn([[LONG_ROW, LAST_TOKEN, SHORTEST], [LAST_TOKEN, LONG_PROMPT, ONE_STARTS_THE_OTHER]], 200))
@example(Drawn([[SHORTEST, LONG_ROW], [SHORTEST]], ALL_AT_ONCE))
@example(Drawn([GOES_ON, [GOES_ON[2], SHORTEST], [GOES_ON[2]]], ALL_AT_ONCE))
def test_any_batch_is_computed_as_trl_does(shallow: Engines, drawn: Drawn) -> None:
    """Log-probabilities, loss and gradients; several batches are one optimiser step.

    Of the long answers float32 knows the sum, below -1000, to 1e-4, and so a reward to 1e-5.
    """
    shallow.packed.tokens_per_microbatch = drawn.budget
    given = drawn.collated(shallow.packed)
    for batch in given:
        with torch.no_grad():
            packed = shallow.packed._evaluated(batch).log_probs.double()
            torch.testing.assert_close(packed, log_probs(shallow.padded, batch), rtol=1e-6, atol=1e-6)
    assert_same(step(shallow.packed, given), step(shallow.padded, given), 1e-5, 1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_examples_share_a_start_and_under_dropout_if_they_may(tmp_path: Path, shared: bool) -> None:
    settings = ["recipe=sft", "lora.lora_dropout=0.1", f"engine.share_under_dropout={shared}"]
    trainer = build_trainer(tmp_path / "run", [*FEW, *SMALL, *write_rows(tmp_path / "rows", pairs()), *settings])
    given = tuple(batches(trainer, number=1, size=4))
    alone = int(given[0]["attention_mask"].sum())

    def computed(training: bool) -> int:
        trainer.model.train(training)
        return sum(len(row.ids) for row, _ in Plan.of(trainer, given))

    assert computed(training=False) <= alone - len(SYSTEM)
    assert computed(training=True) == (computed(training=False) if shared else alone)


def test_a_gradient_under_dropout_is_on_average_trls(build: Callable[..., Engines]) -> None:
    """What is dropped of a shared start is the same for all rows, and the gradient's expectation a sum over rows."""
    both = build("recipe=sft", "lora.lora_dropout=0.5")
    for trainer in (both.packed, both.padded):
        disturb(trainer, 0.2)
        trainer.model.train()
    given = batches(both.packed, number=1, size=4)
    assert sum(len(row.ids) for row, _ in Plan.of(both.packed, tuple(given))) < int(given[0]["attention_mask"].sum())

    def mean(trainer: Any) -> tuple[torch.Tensor, float]:
        """Return the mean of many draws, and its expected squared distance from the mean of all."""
        torch.manual_seed(0)
        draws = torch.stack([step(trainer, given).gradient for _ in range(60)])
        return draws.mean(0), float(draws.var(0).sum()) / len(draws)

    (packed, spread), (padded, other) = mean(both.packed), mean(both.padded)
    for module in both.padded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    without = step(both.padded, given).gradient
    apart = spread + other
    assert float((packed - padded).square().sum()) < 2 * apart
    assert float((packed - without).square().sum()) > 4 * apart, "as many draws tell another mean apart"


# Other architectures.

WINDOW = 16
"""Tokens of a sliding window; most rows are longer."""

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.1,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.1}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
PACKED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("llama", SIZES, ("sft", "dpo")),
    "qwen3": ("qwen3", SIZES, ("sft", "dpo")),
    "gpt2": ("gpt2", GPT2, ("dpo",)),
    "gpt2 without dropout": ("gpt2", {**GPT2, **NO_DROPOUT}, ("sft",)),
    "mistral": ("mistral", {**SIZES, "sliding_window": WINDOW}, ("sft", "dpo")),
    "gemma3": (
        "gemma3_text",
        {**SIZES, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        ("sft", "dpo"),
    ),
}
"""By name: model type, fields of its config, and the recipes for which it has to be packed."""


def model_folder(folder: Path, model_type: str, fields: dict[str, Any]) -> list[str]:
    """Write a tiny random model; return the overrides that load it."""
    from lora_exp.models.embedded import build

    tiny: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / "tiny.yaml"))
    tokenizer = tiny["embedded"]["tokenizer"]
    folder.mkdir(parents=True)
    build({"seed": 0, "config": {"model_type": model_type, **fields}, "tokenizer": tokenizer}, folder)
    return ["model=custom", f"model.pretrained_model_name_or_path={folder}"]


def rows_of(folder: Path) -> list[str]:
    return [*write_rows(folder / "rows", pairs()), f"store.path={folder / 'store.sqlite3'}"]


@pytest.mark.parametrize(("name", "recipe"), [(name, recipe) for name, case in PACKED.items() for recipe in case[2]])
def test_an_architecture_is_packed_and_exact(tmp_path: Path, name: str, recipe: str) -> None:
    model_type, fields, _ = PACKED[name]
    overrides = [f"recipe={recipe}", *model_folder(tmp_path / "model", model_type, fields), *rows_of(tmp_path)]
    with told() as lines:
        engines = build_engines(tmp_path, overrides)
    assert lines["engine"].startswith("packed")
    if recipe == "dpo":
        engines.share_reference()
    longest = max(int(batch["attention_mask"].sum(1).max()) for batch in batches(engines.packed))
    assert longest > 3 * WINDOW
    padded = engines.padded_step()
    assert padded.gradient.norm() > 0
    for budget in (PAIR_AT_A_TIME, ALL_AT_ONCE):
        assert_same(engines.packed_step(budget), padded, 1e-5, 1e-4)


LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
PADDED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("gpt2", GPT2, "c_attn"),
    "llama with attention dropout": ("llama", {**SIZES, "attention_dropout": 0.1}, "q_proj"),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "x_proj"),
    "qwen3_next": ("qwen3_next", {**SIZES, **LINEAR, **EXPERTS}, "q_proj"),
    "mixtral": ("mixtral", {**SIZES, **EXPERTS}, "q_proj"),
}
"""By name: model type, fields of its config, and a layer that carries an adapter."""

REASONS = {
    ("gpt2", "sft"): "drops 10% of its attention weights",
    ("llama with attention dropout", "sft"): "drops 10% of its attention weights",
    # TRL turns off the layers that drop; here the share is a number that the attention reads.
    ("llama with attention dropout", "dpo"): "attention",
    ("mamba", "dpo"): "linear_attention layers",
    ("qwen3_next", "dpo"): "linear_attention layers",
    # TRL adds the router's loss to any mixture of experts whose config has a share for it.
    ("mixtral", "sft"): "router",
    ("mixtral", "dpo"): "router",
}
"""Words of the reason for which it is not packed, by name and recipe."""


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train_are_trained_as_by_trl(tmp_path: Path, bias: str) -> None:
    model = model_folder(tmp_path / "model", "qwen2", SIZES)  # its q, k and v have one
    engines = build_engines(tmp_path, ["recipe=sft", f"lora.bias={bias}", *model, *rows_of(tmp_path)])
    trained = [name for name, each in engines.packed.model.named_parameters() if each.requires_grad]
    assert any(name.endswith("bias") for name in trained)
    assert_same(engines.packed_step(ALL_AT_ONCE), engines.padded_step(), 1e-5, 1e-4)


def test_an_output_layer_whose_bias_trains_is_left_to_trl(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", "phi", SIZES)
    with told() as lines:
        build_trainer(tmp_path, ["recipe=sft", "lora.bias=all", *FEW, *model, *rows_of(tmp_path)])
    assert lines["engine"].startswith("padded")
    assert "output layer is trained" in lines["engine"]


@pytest.mark.parametrize(("name", "recipe"), REASONS)
def test_what_cannot_be_packed_exactly_falls_back_and_says_why(tmp_path: Path, name: str, recipe: str) -> None:
    model_type, fields, layer = PADDED[name]
    model = [*model_folder(tmp_path / "model", model_type, fields), f"lora.target_modules=[{layer}]"]
    run = [*FEW, f"recipe={recipe}", *model, *rows_of(tmp_path)]
    padded = build_trainer(tmp_path / "padded", [*run, "engine=padded"])
    with told() as lines:
        fallen_back = build_trainer(tmp_path / "packed", [*run, "engine=packed"])
    assert lines["engine"].startswith("padded")
    assert REASONS[name, recipe] in lines["engine"].split(":", 1)[1]
    assert not isinstance(fallen_back, PackedTraining)
    assert_same(seeded_step(fallen_back), seeded_step(padded), 1e-6, 1e-6)


def seeded_step(trainer: Any) -> Step:
    """Take a step whose dropout, if there is any, is the same each time."""
    disturb(trainer)
    torch.manual_seed(0)
    return step(trainer, batches(trainer))


# Whole runs.

RUN = [
    "recipe=dpo", "trainer.lr_scheduler_type=constant", "trainer.eval_strategy=no", "trainer.save_strategy=no",
    "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2",
]  # fmt: skip


def train(trainer: Any) -> list[torch.Tensor]:
    """Train; return the token ids of each batch as the loop came by it."""
    seen, collate = [], trainer.data_collator

    def kept(rows: list[Any]) -> Any:
        seen.append(collate(rows))
        return seen[-1]

    trainer.data_collator = kept
    trainer.train()
    return [batch["input_ids"] for batch in seen]


def test_fifty_float64_steps_end_at_the_same_adapter(build: Callable[..., Engines]) -> None:
    """The ten rows make epochs of five batches, so some steps accumulate one batch only."""
    engines = build(*RUN, "trainer.max_steps=50", "trainer.learning_rate=1e-4", disturbed=False).to(torch.float64)
    engines.share_reference()
    engines.packed.tokens_per_microbatch = SOME_AT_A_TIME
    start = adapter(engines.packed)
    seen = [train(each) for each in (engines.padded, engines.packed)]
    assert len(seen[0]) > 50
    assert len(seen[0]) == len(seen[1])
    assert all(map(torch.equal, *seen))
    padded, packed = adapter(engines.padded), adapter(engines.packed)
    assert (padded - start).abs().max() > 1e-3
    assert (packed - padded).abs().max() < 1e-6


BF16 = "trainer.bf16=true"
TRUE = ("trainer.bf16=false", "model.dtype=bfloat16")
"""The weights of a bf16 run, for computing in float64."""


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_a_bf16_gradient_is_as_near_to_the_true_one_as_trls(build: Callable[..., Engines], recipe: str) -> None:
    rounded, true = build(f"recipe={recipe}", BF16), build(f"recipe={recipe}", *TRUE).to(torch.float64)
    if recipe == "dpo":
        true.share_reference()
        for each in (rounded.padded, rounded.packed):
            each.train_dataset, each.precompute_ref_logps = true.packed.train_dataset, True
    exact, padded = true.padded_step().gradient, rounded.padded_step().gradient
    for budget in (PAIR_AT_A_TIME, ALL_AT_ONCE):
        assert distance(rounded.packed_step(budget).gradient, exact) < 1.5 * distance(padded, exact)


def test_twenty_bf16_steps_end_as_near_to_the_true_adapter_as_trls(build: Callable[..., Engines]) -> None:
    """Two padded runs are no measure: a row is rounded alike in every batch of TRL's, so their error is the same one.

    Single runs differ by chance, so the errors of two seeds are added.
    """
    run = [*RUN, "trainer.max_steps=20", "trainer.learning_rate=1e-3"]
    away = {"padded": 0.0, "packed": 0.0}
    for seed in (1, 2):
        rounded = build(*run, f"seed={seed}", BF16, disturbed=False)
        true = build(*run, f"seed={seed}", *TRUE, disturbed=False).to(torch.float64).padded
        ends = {name: trained_adapter(getattr(rounded, name)) for name in away}
        exact = trained_adapter(true)
        for name, end in ends.items():
            away[name] += distance(end, exact)
    assert away["packed"] < 1.5 * away["padded"]


def trained_adapter(trainer: Any) -> torch.Tensor:
    train(trainer)
    return adapter(trainer)


def first_gradient(trainer: Any) -> torch.Tensor:
    """Return the gradient of the first step of a training run."""
    from transformers import TrainerCallback

    found = {}

    class Keep(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            found.update({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})

    trainer.add_callback(Keep())
    trainer.train()
    return torch.cat([found[name].double().flatten() for name in sorted(found)])


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_the_gradient_does_not_depend_on_what_saves_memory(build: Callable[..., Engines], recipe: str) -> None:
    run = [f"recipe={recipe}", *RUN[1:], "trainer.max_steps=1"]
    gradients = []
    for checkpointing, budget in ((False, ALL_AT_ONCE), (False, PAIR_AT_A_TIME), (True, SOME_AT_A_TIME)):
        trainer = build(*run, f"trainer.gradient_checkpointing={checkpointing}".lower()).packed
        trainer.tokens_per_microbatch = budget
        gradients.append(first_gradient(trainer))
        assert trainer.model.get_base_model().is_activation_checkpointing == checkpointing
    assert gradients[0].norm() > 0
    assert all(distance(each, gradients[0]) < 1e-4 for each in gradients[1:])


# Where references come from.


@dataclass(frozen=True)
class Stored:
    """A run's reference log-probabilities, by row, and how many rows were computed and reused."""

    computed: int
    reused: int
    columns: dict[tuple[tuple[int, ...], ...], tuple[float, ...]]


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Stored]:
    """Build a run over some rows and the test's own store, and say what it took from there."""
    numbers = iter(range(100))

    def read(*overrides: str, rows: list[Row] | None = None) -> Stored:
        folder = tmp_path / str(next(numbers))
        data = write_rows(folder / "rows", pairs() if rows is None else rows)
        run = [*FEW, *SMALL, *data, "recipe=dpo", f"store.path={tmp_path / 'store.sqlite3'}", *overrides]
        trainer = build_trainer(folder / "run", run)
        columns = {
            tuple(tuple(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")): tuple(
                row[name] for name in REFERENCE
            )
            for dataset in (trainer.train_dataset, trainer.eval_dataset)
            for row in dataset
        }
        reference = json.loads((folder / "run" / "run.json").read_text())["reference"]
        return Stored(reference["computed"], reference["reused"], columns)

    return read


def test_what_is_read_back_is_what_was_computed(stored: Callable[..., Stored]) -> None:
    first, second = stored(), stored()
    assert (first.computed, first.reused) == (13, 0)
    assert (second.computed, second.reused) == (0, 13)
    assert second.columns == first.columns


def test_what_is_tuned_finds_every_row(stored: Callable[..., Stored]) -> None:
    first = stored()
    for change in (
        ["recipe.beta=0.5"],
        ["trainer.learning_rate=1e-3"],
        ["lora.r=8"],
        ["seed=7"],
        ["recipe.loss_type=ipo"],
        ["trainer.per_device_train_batch_size=2", "engine.tokens_per_microbatch=64"],
    ):
        again = stored(*change)
        assert (again.computed, again.reused) == (0, 13), change
        assert again.columns == first.columns, change


def test_only_new_rows_are_computed(stored: Callable[..., Stored]) -> None:
    first = stored()
    new = {"prompt": "Where is it?", "chosen": "On its way.", "rejected": "Where is what?"}
    more = stored(rows=[new, *pairs()])
    assert (more.computed, more.reused) == (1, 13)
    assert all(more.columns[row] == values for row, values in first.columns.items())


def test_another_limit_computes_only_the_rows_that_it_cuts(stored: Callable[..., Stored]) -> None:
    first, shorter = stored(), stored("recipe.max_length=70")
    uncut = first.columns.keys() & shorter.columns.keys()
    assert 0 < len(uncut) < 13
    assert (shorter.computed, shorter.reused) == (13 - len(uncut), len(uncut))
    assert all(shorter.columns[row] == first.columns[row] for row in uncut)


@pytest.mark.parametrize(
    "change", ["model.embedded.seed=1", "model.dtype=bfloat16", "quant=8bit", "model.adapter=ADAPTER"]
)
def test_another_reference_model_finds_nothing(stored: Callable[..., Stored], tmp_path: Path, change: str) -> None:
    first = stored()
    if "ADAPTER" in change:
        change = change.replace("ADAPTER", str(start_adapter(tmp_path)))
    other = stored(change)
    assert (other.computed, other.reused) == (13, 0)
    assert all(other.columns[row] != first.columns[row] for row in first.columns)


def start_adapter(folder: Path) -> Path:
    """Write an adapter that does something."""
    trainer = build_trainer(folder / "start", [*FEW, *SMALL, *write_rows(folder / "start_rows", pairs()), "recipe=sft"])
    disturb(trainer)
    trainer.model.save_pretrained(folder / "adapter")
    return folder / "adapter"


# What TRL keeps of references, for contrast. It names them by the dataset's fingerprint and the model's weights.


@pytest.fixture
def trl_reference(tmp_path: Path) -> Callable[..., tuple[int, list[float]]]:
    """Build TRL's own trainer; return how many rows' references it computed, and those of the chosen answers."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model = tmp_path / "model"
    model_folder(model, "llama", SIZES)
    write_rows(tmp_path / "rows", pairs())

    class Counting(DPOTrainer):  # type: ignore[misc]
        computed = 0

        def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
            self.computed += len(inputs["input_ids"]) // 2
            return super().compute_ref_log_probs(model, inputs)

        def _send_telemetry(self) -> None:
            """Ask the hub nothing."""

    def read(**arguments: Any) -> tuple[int, list[float]]:
        trainer = Counting(
            model=AutoModelForCausalLM.from_pretrained(model),
            processing_class=AutoTokenizer.from_pretrained(model),
            # From a file: of a dataset in memory TRL finds nothing again at all.
            train_dataset=load_dataset(
                "json", data_files=str(tmp_path / "rows" / "train.dpo.jsonl"), split="train", cache_dir=str(tmp_path)
            ),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
            args=DPOConfig(
                output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
                gradient_checkpointing=False, precompute_ref_log_probs=True, **arguments,
            ),
        )  # fmt: skip
        return trainer.computed, trainer.train_dataset["ref_chosen_logps"][:]

    return read


def test_trl_computes_references_again_for_another_beta(trl_reference: Callable[..., Any]) -> None:
    """Its filter of long prompts closes over all arguments, so any of them changes the dataset's fingerprint."""
    first, same, other = trl_reference(beta=0.1), trl_reference(beta=0.1), trl_reference(beta=0.5)
    assert (first[0], same[0], other[0]) == (10, 0, 10)
    assert other[1] == first[1]


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_trl_serves_stale_references_where_it_keeps_the_end(trl_reference: Callable[..., Any]) -> None:
    """With `keep_end` nothing is filtered, and the limit, which the collator applies, is in no fingerprint."""
    first, stale = (trl_reference(truncation_mode="keep_end", max_length=length) for length in (60, 30))
    # Another seed draws other adapters, so that TRL finds nothing; they start as zero, so the reference is the same.
    right = trl_reference(truncation_mode="keep_end", max_length=30, seed=1)
    assert (first[0], stale[0], right[0]) == (10, 0, 10)
    assert stale[1] == first[1]
    assert stale[1] != pytest.approx(right[1])
