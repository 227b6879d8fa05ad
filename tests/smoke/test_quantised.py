"""A quantised base means one thing: weights in 8 or 4 bits, multiplied in the compute dtype, by either engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_exp.errors import UserError
from lora_exp.recipes.trl import give_back
from tests.engines import (
    ALL_AT_ONCE,
    ENGINES,
    FEW,
    PAIR_AT_A_TIME,
    Engines,
    build_engines,
    distance,
    told,
)
from tests.few import ROWS, SMALL, pairs, write_rows
from tests.runs import build_trainer, load_policy, run_in

QUANTS = ("none", "8bit", "4bit")
RECIPES = ("sft", "dpo")
BUDGETS = (PAIR_AT_A_TIME, ALL_AT_ONCE)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Engines]:
    rows = write_rows(tmp_path / "rows", pairs())
    store = f"store.path={tmp_path / 'reference.sqlite3'}"

    def make(*overrides: str, disturbed: bool = True) -> Engines:
        return build_engines(tmp_path, [*SMALL, *rows, store, *overrides], disturbed)

    return make


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_float32_step_is_trls(build: Callable[..., Engines], recipe: str, quant: str) -> None:
    engines = build(f"recipe={recipe}", f"quant={quant}")
    padded = engines.padded_step()
    for budget in BUDGETS:
        packed = engines.packed_step(budget)
        assert packed.loss == pytest.approx(padded.loss, rel=1e-6)
        assert packed.metrics == pytest.approx(padded.metrics, rel=1e-5, abs=1e-5)
        assert distance(packed.gradient, padded.gradient) < 1e-5


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_float32_steps_are_trls(tmp_path: Path, recipe: str, quant: str) -> None:
    """Adam takes a whole step along a gradient that is 0 but for rounding; with this seed there is none."""
    rows = write_rows(tmp_path / "rows", pairs(23))
    steps = [
        "trainer.max_steps=10",
        "trainer.learning_rate=1e-2",
        "trainer.logging_steps=1",
        "trainer.eval_strategy=no",
    ]
    shared = [f"store.path={tmp_path / 'reference.sqlite3'}", "trainer.save_strategy=no", *SMALL, *rows, *steps]
    losses = {}
    for engine in ENGINES:
        run = [*FEW, f"engine={engine}", f"recipe={recipe}", f"quant={quant}", "seed=1", *shared]
        trainer = build_trainer(tmp_path / engine, run)
        trainer.train()
        losses[engine] = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    assert len(losses["packed"]) == 10
    assert losses["packed"][0] == pytest.approx(losses["padded"][0], rel=1e-6)
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-4)


def in_float64(trainer: Any) -> Any:
    """Put float64 layers with the same dequantised weights in the place of the quantised ones, and widen the rest."""
    from lora_exp.engine.frozen import weight

    for layer in list(trainer.model.modules()):
        base = getattr(layer, "base_layer", None)
        if base is not None:
            plain = torch.nn.Linear(base.in_features, base.out_features, bias=False)
            plain.weight = torch.nn.Parameter(weight(base, torch.float32).double(), requires_grad=False)
            layer.base_layer = plain
    trainer.model.double()
    return trainer


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bf16_gradient_is_as_near_to_the_true_one_as_trls(
    build: Callable[..., Engines], recipe: str, quant: str
) -> None:
    run = (f"recipe={recipe}", f"quant={quant}")
    rounded = build(*run, "trainer.bf16=true")
    true = build(*run, "trainer.bf16=false", "model.dtype=bfloat16")
    for name, exact in true.padded.model.named_parameters():
        if exact.requires_grad:  # bf16 adapters, which float64 holds without loss
            exact.data.copy_(rounded.padded.model.get_parameter(name).data)
    if recipe == "dpo":
        for each in (rounded.padded, rounded.packed, true.padded):
            each.train_dataset, each.precompute_ref_logps = true.packed.train_dataset, True
    reference = Engines(in_float64(true.padded), true.packed).padded_step().gradient
    padded = distance(rounded.padded_step().gradient, reference)
    for budget in BUDGETS:
        assert distance(rounded.packed_step(budget).gradient, reference) < 1.5 * padded


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_an_evaluation_is_trls(build: Callable[..., Engines], quant: str) -> None:
    engines = build("recipe=dpo", f"quant={quant}")
    engines.share_reference()
    expected, found = engines.padded.evaluate(), engines.packed.evaluate()
    timed = ("time", "per_second")
    names = [name for name in expected if name.startswith("eval_") and not any(word in name for word in timed)]
    assert len(names) > 8
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_dora_learns_on_a_quantised_base(tmp_path: Path, quant: str) -> None:
    run = ["recipe=dpo", "tracker=none", "trainer=cpu", f"quant={quant}", "lora=dora", "trainer.max_steps=2", *ROWS]
    trainer = build_trainer(tmp_path, run)
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_adapters_are_float32_unless_a_run_computes_in_bf16(
    build: Callable[..., Engines], quant: str, dtype: str
) -> None:
    """fp16 trains on GPUs alone, so its part is done by hand here, on a trainer that has bf16 adapters."""
    trainer = build("recipe=dpo", f"quant={quant}", f"trainer.bf16={str(dtype != 'float32').lower()}").padded
    if dtype == "float16":
        trained = {name: each.data.float() for name, each in trainer.model.named_parameters() if each.requires_grad}
        give_back(trainer.model, trained)
    trained = {each.dtype for each in trainer.model.parameters() if each.requires_grad}
    assert trained == {torch.float32}
    kept = {each.dtype for each in trainer.model.parameters() if not each.requires_grad}
    assert (kept & {torch.int8, torch.uint8} != set()) == (quant != "none")


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_an_adapter_in_float32_keeps_its_numbers_in_a_run_on_top_of_it(tmp_path: Path, quant: str) -> None:
    short = ["tracker=none", "trainer=cpu", "trainer.bf16=false", f"quant={quant}", "samples.num_prompts=0"]
    short += ["trainer.eval_strategy=no", "trainer.max_steps=2", *ROWS]
    start = run_in(tmp_path / "sft", ["recipe=sft", "trainer.learning_rate=1e-2", *short]).folder / "adapter"
    saved = load_file(start / "adapter_model.safetensors")
    for recipe in RECIPES:
        trainer = build_trainer(tmp_path / recipe, [f"recipe={recipe}", f"model.adapter={start}", *short])
        trained = {
            name.replace(".default", ""): each.detach().clone()
            for name, each in trainer.model.named_parameters()
            if each.requires_grad
        }
        assert trained.keys() == saved.keys()
        assert all(torch.equal(trained[name], saved[name]) for name in saved)
    trainer.train()  # DPO, whose policy starts at its reference


@pytest.fixture
def says() -> Iterator[dict[str, str]]:
    with told() as lines:
        yield lines


def test_an_activated_adapter_is_left_to_trl(tmp_path: Path, says: dict[str, str]) -> None:
    trainer = build_trainer(
        tmp_path, ["recipe=sft", "tracker=none", "trainer=cpu", "+lora.alora_invocation_tokens=[5,6]", *ROWS]
    )
    assert "padded (TRL's own forward): lora.alora_invocation_tokens" in says["engine"]
    assert not hasattr(trainer, "packed_forward")


@pytest.mark.parametrize("engine", ENGINES)
def test_biases_that_train_keep_the_dtype_of_their_base(tmp_path: Path, engine: str) -> None:
    run = ["recipe=sft", "tracker=none", "trainer=cpu", "trainer.bf16=false", "model.dtype=bfloat16", "lora.bias=all"]
    biased = ["+model.embedded.config.attention_bias=true", "trainer.max_steps=1", f"engine={engine}", *ROWS]
    trainer = build_trainer(tmp_path, [*run, *biased])
    dtypes = {
        name.rpartition(".")[2]: each.dtype for name, each in trainer.model.named_parameters() if each.requires_grad
    }
    assert dtypes == {"weight": torch.float32, "bias": torch.bfloat16}
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_float32_base_is_packed_in_a_bf16_run(tmp_path: Path, recipe: str) -> None:
    """Autocast narrows what a layer multiplies; the attention then has numbers of several dtypes."""
    short = [f"recipe={recipe}", "tracker=none", "trainer=cpu", "trainer.bf16=true", "model.dtype=float32"]
    short += ["trainer.max_steps=3", "trainer.learning_rate=1e-2", "trainer.warmup_steps=0", "trainer.logging_steps=1"]
    short += ["samples.num_prompts=0", "trainer.eval_strategy=no", "trainer.save_strategy=no", *ROWS]
    losses = {}
    for engine in ENGINES:
        trainer = build_trainer(tmp_path / engine, [*short, f"engine={engine}"])
        assert hasattr(trainer, "packed_forward") == (engine == "packed")
        trainer.train()
        losses[engine] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses["packed"]) == 3
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-2)


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_layers_are_kept_whole_but_the_output_layer_always(tmp_path: Path, quant: str) -> None:
    short = ["tracker=none", "recipe=sft", f"quant={quant}", "trainer.max_steps=1", "samples.num_prompts=0", *ROWS]
    with pytest.raises(UserError, match=r'\+quant\.llm_int8_skip_modules=\["lm_head","q_proj"\]'):
        run_in(tmp_path / "refused", [*short, "+quant.llm_int8_skip_modules=[q_proj]"])
    run = run_in(tmp_path / "run", [*short, "+quant.llm_int8_skip_modules=[lm_head,q_proj]"])
    policy, _ = load_policy(run.folder, str(run.folder))
    kinds = {name.split(".")[-2]: type(part) for name, part in policy.model.named_modules() if "base_layer" in name}
    assert kinds["q_proj"] is torch.nn.Linear
    assert kinds["k_proj"] is not torch.nn.Linear
