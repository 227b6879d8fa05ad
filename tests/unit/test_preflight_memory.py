"""The memory estimate: counted on a model without weights as on one with them, and what it stops."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_exp.config import Config
from lora_exp.data.lengths import RowLengths
from lora_exp.engine import forward
from lora_exp.engine.packing import pack
from lora_exp.engine.settings import LEAST_TOKENS
from lora_exp.errors import UserError
from lora_exp.models.precision import choose_precision
from lora_exp.preflight import model_passes
from lora_exp.preflight.activations import Passes, packed_passes, padded_passes
from lora_exp.preflight.batches import STEPS, Largest, Order, flat_row, largest_flat, largest_padded
from lora_exp.preflight.fit import require_fit
from lora_exp.preflight.live import LiveBytes
from lora_exp.preflight.memory import Memory, Place, Way, states_of
from lora_exp.preflight.twin import Twin, build_twin, read_structure
from lora_exp.validation import validate
from tests.runs import composed, run_in

CPU = torch.device("cpu")
EXAMPLES = np.array([[40, 30], [25, 60], [300, 12]])
COMMON = 20
"""Tokens that their prompts share."""
BF16, FP32 = "trainer.bf16=true", "trainer.bf16=false"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of an embedded model of three layers."""
    from lora_exp.models.embedded import build

    folder = tmp_path_factory.mktemp("tiny")
    embedded: Any = OmegaConf.to_container(composed(["model=tiny"]).model.embedded, resolve=True)
    embedded["config"]["num_hidden_layers"] = 3
    build(embedded, folder)
    return str(folder)


@pytest.fixture
def config(tiny: str) -> Callable[..., Config]:
    def make(*overrides: str) -> Config:
        model = ["model=custom", f"model.pretrained_model_name_or_path={tiny}"]
        return validate(composed([*model, "trainer=cpu", *overrides]))

    return make


def real_policy(config: Config, tiny: str, folder: Path) -> Any:
    from lora_exp.models.policy import load_policy

    return load_policy(config, tiny, None, folder, CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the system says of a process")
@pytest.mark.parametrize("quant", ["none", "8bit", "4bit"])
def test_only_a_base_as_it_is_stored_keeps_its_file(
    config: Callable[..., Config], tiny: str, tmp_path: Path, quant: str
) -> None:
    files = tmp_path / "model"
    shutil.copytree(tiny, files)
    policy = real_policy(config(FP32, f"quant={quant}"), str(files), tmp_path)
    kept = str(files / "model.safetensors") in Path("/proc/self/maps").read_text()
    assert kept == (quant == "none")
    assert policy.total_parameters


@pytest.mark.parametrize("precision", [BF16, FP32])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_without_weights_holds_what_one_with_weights_holds(
    config: Callable[..., Config], tiny: str, tmp_path: Path, precision: str, checkpointing: bool
) -> None:
    """The same count on real tensors of the real model: the packed engine's forward and backward pass."""
    settings = config(precision)
    chosen = choose_precision(settings.trainer, CPU)
    twin = build_twin(settings, read_structure(settings, tiny), chosen, None)
    policy = real_policy(settings, tiny, tmp_path)

    class Real:
        mode = torch.no_grad()  # stands for a mode that changes nothing
        model, base, bits, quantised = policy.model, policy.model.get_base_model(), None, frozenset[str]()

        @staticmethod
        def trainable() -> list[Any]:
            return [each for each in policy.model.parameters() if each.requires_grad]

    found = packed_passes(twin, chosen, EXAMPLES, True, checkpointing, COMMON)
    expected = _on_real_tensors(Real, chosen, checkpointing)
    assert found.kept == pytest.approx(expected.kept, rel=0.02)
    assert found.peak == pytest.approx(expected.peak, rel=0.05)


def _on_real_tensors(real: Any, precision: Any, checkpointing: bool) -> Passes:
    from lora_exp.engine.forward import PackedForward

    model = real.model
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    for parameter in real.trainable():
        parameter.grad = torch.zeros_like(parameter)
    row, forward = pack(flat_row(EXAMPLES, COMMON)), PackedForward(real.base)
    before = [*model.parameters(), *model.buffers(), *(each.grad for each in real.trainable())]
    kept = []
    real.base.base_model.register_forward_hook(lambda *_: kept.append(live.now))
    half = precision.dtype != "float32"
    with torch.autocast("cpu", torch.bfloat16, enabled=half), LiveBytes(before) as live:
        total = forward.scores(row).log_probs.sum()
        total.backward()
    return Passes(kept[0], live.peak, len(live.products))


@pytest.mark.parametrize("common", [0, COMMON, 1000])
def test_rows_that_stand_for_others_share_as_much(common: int) -> None:
    families = flat_row(EXAMPLES, common)
    assert len(pack(families, across=False).ids) == EXAMPLES.sum()
    shared = np.minimum(EXAMPLES[:, 0], common)
    assert len(pack(families).ids) == EXAMPLES.sum() - shared.sum() + shared.max()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_takes_what_is_estimated(
    config: Callable[..., Config], tiny: str, tmp_path: Path, bits: int
) -> None:
    settings = config(BF16, f"quant={bits}bit")
    twin = build_twin(settings, read_structure(settings, tiny), choose_precision(settings.trainer, CPU), None)
    base = real_policy(settings, tiny, tmp_path).model.get_base_model()
    held = 0
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            continue
        held += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            held += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        held += getattr(getattr(parameter, "SCB", None), "nbytes", 0)
    assert twin.base_bytes == pytest.approx(held + sum(each.nbytes for each in base.buffers()), rel=0.03)
    trainable = sum(each.nbytes for each in twin.trainable())
    assert trainable == 2 * sum(each.numel() for each in twin.trainable()), "adapters of a quantised base are bf16"


def lengths_of(examples: Any) -> RowLengths:
    lengths = RowLengths()
    for number, (prompt, *answers) in enumerate(np.asarray(examples).tolist()):
        lengths.add([number] * prompt, [[n + 1] * answer for n, answer in enumerate(answers)])
    return lengths


def memory_of(config: Config, tiny: str, space: int = 2**40, examples: Any = EXAMPLES) -> Memory:
    place = Place(CPU, 2**20, space, space)
    lengths = lengths_of(examples)
    return Memory(config, read_structure(config, tiny), None, place, {"train": lengths, "val": lengths})


@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_some_layers_tell_of_all(
    config: Callable[..., Config], tiny: str, monkeypatch: pytest.MonkeyPatch, engine: str, checkpointing: bool
) -> None:
    settings = config(FP32, f"engine={engine}")
    way = Way(engine, 1024 if engine == "packed" else None, checkpointing)
    parts = memory_of(settings, tiny)
    assert [layers for layers, _ in parts._model.parts] == [1, 2]
    monkeypatch.setattr(model_passes, "_PASSES", {})
    whole = memory_of(settings, tiny)
    whole._model.__dict__["parts"] = ((3, whole._model.whole),)
    assert parts.estimate(way).training == pytest.approx(whole.estimate(way).training, rel=0.01)


def test_the_same_model_in_another_folder_is_not_counted_again(
    config: Callable[..., Config], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job of a sweep on the embedded model has it in a folder of its own."""
    settings, way = config(FP32), Way("packed", 1024, False)
    counted = memory_of(settings, tiny).estimate(way)
    other = shutil.copytree(tiny, tmp_path / "other")
    monkeypatch.delattr(model_passes, "packed_passes")
    monkeypatch.delattr(model_passes, "build_twin")
    assert memory_of(settings, str(other)).estimate(way) == counted


def test_every_part_is_counted_once(config: Callable[..., Config], tiny: str) -> None:
    settings = config("recipe=dpo", FP32)
    examples = [[30, 20, 25]] * 12
    memory = memory_of(settings, tiny, examples=examples)
    estimate = memory.estimate(Way("packed", 1024, False))
    sizes = {item.name: item.size for item in estimate.items}
    assert sizes["process"] == 2**20
    assert sizes["base"] == pytest.approx(4 * memory._model.whole.base_parameters, rel=0.001)
    assert sizes["optimiser"] == 2 * sizes["adapter"] == 2 * sizes["gradients"] == 8 * memory.trained
    assert estimate.training == sum(sizes.values()) <= estimate.total
    assert set(estimate.stages) >= {"loading", "evaluation"}


def test_what_costs_more_is_estimated_higher(config: Callable[..., Config], tiny: str) -> None:
    def total(*overrides: str, way: Way = Way("packed", 1024, False)) -> int:  # noqa: B008
        return memory_of(config(FP32, *overrides), tiny).estimate(way).total

    assert total(way=Way("packed", 256, False)) < total()
    assert total(way=Way("packed", 1024, True)) < total()
    assert total("lora.r=64") > total()
    assert total("trainer.optim=sgd") < total()
    assert total("quant=4bit", BF16) < total("quant=8bit", BF16)


def test_optimisers_keep_what_they_keep() -> None:
    def states(optimiser: type[Any], **arguments: Any) -> float:
        parameter = torch.nn.Parameter(torch.zeros(64, 64))
        parameter.grad = torch.ones_like(parameter)
        made = optimiser([parameter], lr=0.1, **arguments)
        made.step()
        held = [value for value in made.state[parameter].values() if isinstance(value, torch.Tensor)]
        return round(sum(each.numel() for each in held) / parameter.numel(), 1)

    assert states_of("adamw_torch") == states(torch.optim.AdamW)
    assert states_of("sgd") == states(torch.optim.SGD)
    assert states_of("rmsprop") == states(torch.optim.RMSprop)
    assert states_of("adagrad") == states(torch.optim.Adagrad)
    assert states_of("adamw_bnb_8bit") == 0.5


examples = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=30).map(np.array)


@given(examples, st.integers(1, 8), st.integers(1, 3), st.integers(20, 400), st.integers(0, 60))
def test_the_largest_micro_batch_is_one_that_can_come(
    rows: Any, batch: int, batches: int, budget: int, common: int
) -> None:
    common = min(common, rows[:, 0].min())
    found = largest_flat(rows, Order(batch, batches, shuffled=True), budget, common)
    assert len(found) <= batch * batches
    tokens = found.sum() - common * (len(found) - 1)
    assert Largest(flat=found, common=common).tokens == tokens
    assert tokens <= budget or len(found) == 1
    assert tokens >= rows.sum(axis=1).max()
    assert {tuple(row) for row in found.tolist()} <= {tuple(row) for row in rows.tolist()}


@given(examples, st.integers(1, 8))
def test_the_largest_padded_batch_of_an_evaluation_is_found(rows: Any, batch: int) -> None:
    widths = rows.sum(axis=1)
    batches = [widths[first : first + batch] for first in range(0, len(widths), batch)]
    expected = max(len(each) * each.max() for each in batches)
    found = largest_padded(rows, Order(batch, 1, shuffled=False))
    assert found[0] * found[1] == expected


def test_batches_of_a_large_data_set_are_not_all_looked_at() -> None:
    rows = np.ones((10**6, 2), dtype=np.int64)
    assert largest_padded(rows, Order(8, 1, shuffled=True)) == (8, 2)
    assert len(rows) > STEPS * 8


def refused(config: Config, tiny: str, way: Way, space: int) -> UserError:
    with pytest.raises(UserError) as caught:
        require_fit(memory_of(config, tiny, space), way)
    return caught.value


def test_what_cannot_fit_is_told_with_what_would_make_it_fit(config: Callable[..., Config], tiny: str) -> None:
    settings = config(FP32)
    way = Way("packed", 1024, False)
    need = memory_of(settings, tiny).estimate(way).total
    require_fit(memory_of(settings, tiny, need), way)
    error = refused(settings, tiny, way, need - 1)
    places = [problem.where for problem in error.problems]
    assert places[0] == f"engine.tokens_per_microbatch={LEAST_TOKENS}"
    assert places[1] == "trainer.gradient_checkpointing=true"
    assert "quant=4bit" in places[2:]
    assert "activations" in str(error)
    assert all("about" in problem.what for problem in error.problems)


def test_where_no_change_is_enough_several_are_named(config: Callable[..., Config], tiny: str) -> None:
    settings = config(FP32, "engine=padded", "trainer.per_device_train_batch_size=4")
    least = memory_of(settings, tiny).estimate(Way("packed", LEAST_TOKENS, True)).total
    error = refused(settings, tiny, Way("padded", None, False), least)
    assert error.problems[0].where == "engine=packed"
    hopeless = refused(settings, tiny, Way("padded", None, False), 2**20)
    assert "still need" in hopeless.problems[-1].what
    assert hopeless.problems[-1].where == "model"


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Put this process into a control group that is full."""
    from lora_exp import machine
    from lora_exp.preflight import place

    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(place, "_resident", lambda: 2**20)
    monkeypatch.setattr(place, "_process", [2**20])
    return


@pytest.mark.usefixtures("no_memory")
def test_a_run_that_cannot_fit_stops_before_its_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_exp.models import policy

    def loaded(*_: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(policy, "load_policy", loaded)
    with pytest.raises(UserError, match="the run would need about"):
        run_in(tmp_path / "run", ["model=tiny", "tracker=none"])


def test_padded_batches_are_counted_with_trls_own_head(config: Callable[..., Config], tiny: str) -> None:
    settings = config(FP32)
    chosen = choose_precision(settings.trainer, CPU)
    twin: Twin = build_twin(settings, read_structure(settings, tiny), chosen, None)
    small, large = (padded_passes(twin, chosen, (rows, 64), True, False) for rows in (2, 4))
    assert large.kept == pytest.approx(2 * small.kept, rel=0.05)
    assert "forward" not in vars(twin.base), "the model is as it was"


def test_a_model_that_cannot_be_counted_is_guessed_at_and_said_so(
    config: Callable[..., Config], tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Passes:
        raise NotImplementedError("its attention uses sinks")

    settings, way = config(FP32), Way("packed", 1024, False)
    counted = memory_of(settings, tiny).estimate(way)
    monkeypatch.setattr(model_passes, "_PASSES", {})
    monkeypatch.setattr(model_passes, "packed_passes", refuse)
    guessed = memory_of(settings, tiny).estimate(way)
    item = next(item for item in guessed.items if item.name == "activations")
    assert item.how == "a rough guess, as this model cannot be counted: its attention uses sinks"
    assert counted.training / 3 < guessed.training < counted.training * 3


def test_a_mistake_of_ours_is_no_reason_to_guess(
    config: Callable[..., Config], tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here: calling our own function with an argument that it does not have."""
    monkeypatch.setattr(model_passes, "_PASSES", {})
    monkeypatch.setattr(forward, "Layout", partial(forward.Layout, no_such_argument=1))
    with pytest.raises(TypeError, match="no_such_argument"):
        memory_of(config(FP32), tiny).estimate(Way("packed", 1024, False))
