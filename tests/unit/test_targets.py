"""Which layers get an adapter: every linear one but the head, in whatever way an architecture names them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lora_exp.errors import UserError
from lora_exp.models.targets import choose_targets, linear_layers, quantised_layers, uses_conv1d

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
GPT2 = {"c_attn", "c_proj", "c_fc"}
FUSED = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
EXPECTED = {"llama": LLAMA, "gpt2": GPT2, "gpt_neox": FUSED, "falcon": FUSED}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
}
Build = Callable[..., Any]


@pytest.fixture(scope="module")
def build() -> Build:
    """Return a function that makes a small model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(model_type: str, **fields: Any) -> Any:
        config = AutoConfig.for_model(model_type, vocab_size=40, **{**SIZES[model_type], **fields})
        return AutoModelForCausalLM.from_config(config)

    return make


def adapted_by_peft(model: Any, targets: list[str]) -> set[str]:
    """Return the layers that PEFT adapts for these targets."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=uses_conv1d(model, linear_layers(model)))
    )
    return set(wrapped.targeted_module_names)


every_architecture = pytest.mark.parametrize("model_type", EXPECTED)


@every_architecture
def test_auto_finds_the_linear_layers_of_an_architecture(build: Build, model_type: str) -> None:
    assert set(choose_targets(build(model_type), "auto")) == EXPECTED[model_type]


@every_architecture
@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
def test_neither_the_head_nor_an_embedding_is_adapted(build: Build, model_type: str, tied: bool) -> None:
    model = build(model_type, tie_word_embeddings=tied)
    kept_out = {model.get_output_embeddings(), model.get_input_embeddings()}
    assert not kept_out & {model.get_submodule(name) for name in linear_layers(model)}
    names = adapted_by_peft(model, choose_targets(model, "auto"))
    assert not [name for name in names if re.search(r"embed|wte|wpe|lm_head", name)]


@every_architecture
def test_auto_means_to_peft_exactly_the_linear_layers(build: Build, model_type: str) -> None:
    model = build(model_type)
    layers = set(linear_layers(model))
    assert adapted_by_peft(model, choose_targets(model, "auto")) == layers


def test_a_layer_that_is_named_like_the_head_is_adapted_and_the_head_is_not() -> None:
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"output": nn.Linear(4, 4), "input": nn.Linear(4, 4)})])
            self.output = nn.Linear(4, 4)

        def get_output_embeddings(self) -> nn.Module:
            return self.output

    model = Model()
    targets = choose_targets(model, "auto")
    assert set(targets) == {"layers.0.output", "layers.0.input"}
    assert adapted_by_peft(model, targets) == {"layers.0.output", "layers.0.input"}


def test_only_conv1d_keeps_its_weight_the_other_way_round(build: Build) -> None:
    found = {name: uses_conv1d(model, linear_layers(model)) for name, model in {n: build(n) for n in EXPECTED}.items()}
    assert [name for name, conv1d in found.items() if conv1d] == ["gpt2"]


@pytest.mark.parametrize(
    "wanted",
    [["q_proj", "v_proj"], ["self_attn.q_proj"], ["model.layers.0.mlp.up_proj"], ["q_proj", "mlp.down_proj"]],
    ids=" ".join,
)
def test_names_and_endings_of_names_are_taken_as_peft_takes_them(build: Build, wanted: list[str]) -> None:
    model = build("llama")
    assert choose_targets(model, wanted) == wanted
    assert len(adapted_by_peft(model, wanted)) == len(wanted)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (r".*\.(q|v)_proj", {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}),
        (r"model\.layers\.0\.mlp\..*", {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}),
    ],
)
def test_a_regular_expression_must_match_a_whole_name(build: Build, wanted: str, expected: set[str]) -> None:
    model = build("llama", num_hidden_layers=2)
    assert set(choose_targets(model, wanted)) >= expected
    matching = {name for name in linear_layers(model) if re.fullmatch(wanted, name)}
    assert adapted_by_peft(model, choose_targets(model, wanted)) == matching


def refusal(model: Any, wanted: list[str] | str) -> UserError:
    with pytest.raises(UserError) as caught:
        choose_targets(model, wanted)
    return caught.value


@every_architecture
def test_a_wrong_name_lists_the_names_there_are(build: Build, model_type: str) -> None:
    (problem,) = refusal(build(model_type), ["no_such_layer"]).problems
    assert problem.where == "lora.target_modules"
    assert "no_such_layer" in problem.what
    assert set(re.findall(r"\w+", problem.mend)) >= EXPECTED[model_type]


def test_a_slip_of_the_pen_gets_the_nearest_name(build: Build) -> None:
    (problem,) = refusal(build("llama"), ["q_porj"]).problems
    assert "did you mean q_proj?" in problem.mend


def test_all_wrong_names_are_told_at_once(build: Build) -> None:
    problems = refusal(build("llama"), ["q_proj", "c_attn", "c_fc"]).problems
    assert ["c_attn" in problem.what or "c_fc" in problem.what for problem in problems] == [True, True]


@pytest.mark.parametrize("wanted", ["lm_head", "embed_tokens", "roj", "layers"])
def test_what_is_no_linear_layer_or_a_part_of_a_name_is_refused(build: Build, wanted: str) -> None:
    assert refusal(build("llama"), [wanted]).problems


def test_an_expression_that_matches_no_layer_is_refused(build: Build) -> None:
    assert refusal(build("llama"), r".*\.c_attn").problems


def test_an_expression_that_is_none_is_refused(build: Build) -> None:
    (problem,) = refusal(build("llama"), r".*\.(q_proj").problems
    assert problem.where == "lora.target_modules"


def test_an_empty_list_is_refused(build: Build) -> None:
    assert refusal(build("llama"), []).problems


def test_layers_that_are_kept_whole_are_not_counted_as_quantised(build: Build) -> None:
    model = build("llama")
    assert quantised_layers(model, None) == linear_layers(model)
    kept = quantised_layers(model, ["lm_head", "q_proj"])
    assert set(linear_layers(model)) - set(kept) == {"model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("model_type", "layer"), [("llama", "q_proj"), ("gpt_neox", "dense")])
def test_the_output_layer_is_not_quantised(build: Build, model_type: str, layer: str, tied: bool) -> None:
    model = build(model_type, tie_word_embeddings=tied)
    with pytest.raises(UserError) as caught:
        quantised_layers(model, [layer])
    (problem,) = caught.value.problems
    assert "lm_head" in problem.what
    assert problem.mend == f"""'+quant.llm_int8_skip_modules=["lm_head","{layer}"]'"""
    assert quantised_layers(model, ["lm_head", layer])


@pytest.mark.parametrize(
    "kept", [["model.layers.[0-9]+.mlp"], ["v_proj", "q_proj|k_proj"], [r"model\.layers.0", '(?:"|model).*up_proj']]
)
def test_a_list_without_the_output_layer_comes_back_whole(build: Build, kept: list[str]) -> None:
    model = build("llama")
    with pytest.raises(UserError) as caught:
        quantised_layers(model, kept)
    (problem,) = (each for each in caught.value.problems if "output layer" in each.what)
    (override,) = OverridesParser.create().parse_overrides(shlex.split(problem.mend))
    assert override.value() == ["lm_head", *kept]


def test_a_name_that_keeps_no_layer_whole_is_refused(build: Build) -> None:
    with pytest.raises(UserError) as caught:
        quantised_layers(build("llama"), ["lm_head", "q_prj", "layers.7"])
    first, second = caught.value.problems
    assert first.what == "'q_prj' matches no layer"
    assert "did you mean q_proj?" in first.mend
    assert second.what == "'layers.7' matches no layer"


def test_a_list_that_leaves_nothing_to_quantise_is_refused(build: Build) -> None:
    with pytest.raises(UserError) as caught:
        quantised_layers(build("llama"), [".*"])
    (problem,) = caught.value.problems
    assert problem.mend == "quant=none"
