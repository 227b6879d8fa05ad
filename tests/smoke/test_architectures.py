"""Models of other shapes, from a folder, through `model=custom`: targets are found, both recipes train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_exp.config import CONF_DIR
from lora_exp.errors import UserError
from tests.few import ROWS
from tests.runs import run_in

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA_LIKE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SHAPES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "gpt2": ({"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 1024}, {"c_attn", "c_proj", "c_fc"}),
    "gpt_neox": (SIZES, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "qwen3": ({**SIZES, "num_key_value_heads": 1, "head_dim": 16}, LLAMA_LIKE),
    "gemma3_text": ({**SIZES, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 32}, LLAMA_LIKE),
    "mistral": ({**SIZES, "num_key_value_heads": 1}, LLAMA_LIKE),
}


@pytest.fixture(scope="module", params=SHAPES)
def custom(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return an architecture's name and a folder with a tiny random model of it."""
    fields, _ = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder, request.param, fields)
    return request.param, folder


def write_model(folder: Path, model_type: str, fields: dict[str, Any]) -> None:
    """Write a random model, with the tokenizer of `model=tiny`."""
    from lora_exp.models.embedded import build

    tokenizer: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / "tiny.yaml"))["embedded"]["tokenizer"]  # type: ignore[index, call-overload]
    build({"seed": 0, "config": {"model_type": model_type, **fields}, "tokenizer": tokenizer}, folder)


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_it_trains(custom: tuple[str, Path], tmp_path: Path, recipe: str) -> None:
    name, folder = custom
    run = run_in(
        tmp_path / "run",
        [
            f"recipe={recipe}", "model=custom", f"model.pretrained_model_name_or_path={folder}", "tracker=none",
            "trainer.max_steps=2", "trainer.logging_steps=1", "samples.num_prompts=1", "samples.max_new_tokens=3",
            *ROWS,
        ],
    )  # fmt: skip
    assert set(run.results.run["target_modules"]) == SHAPES[name][1]
    assert all(line["grad_norm"] > 0 for line in run.results.steps if "grad_norm" in line)


def test_a_target_that_is_not_there_is_told_with_those_that_are(custom: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = custom
    overrides = [f"model.pretrained_model_name_or_path={folder}", "lora.target_modules=[nope]", "tracker=none"]
    with pytest.raises(UserError) as caught:
        run_in(tmp_path / "run", ["model=custom", *overrides])
    assert all(each in str(caught.value) for each in SHAPES[name][1])


def test_layers_that_peft_refuses_are_told_with_those_that_are_left(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "mamba", {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4})
    run = ["model=custom", f"model.pretrained_model_name_or_path={tmp_path / 'model'}", "tracker=none"]
    with pytest.raises(UserError, match="'out_proj' is incompatible") as caught:
        run_in(tmp_path / "refused", run)
    (mend,) = [problem.mend for problem in caught.value.problems]
    assert mend.startswith("lora.target_modules=[dt_proj,in_proj,x_proj]")
    run += [mend.split()[0], "trainer.max_steps=1", "recipe.max_length=128", "samples.num_prompts=0"]
    assert run_in(tmp_path / "run", run).results.run["status"] == "finished"


def test_a_run_with_nothing_left_to_learn_from_stops(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is left to learn from"):
        run_in(tmp_path / "run", ["tracker=none", "recipe.max_length=30", "recipe.max_prompt_length=null"])
    assert (tmp_path / "run" / "data_report.json").exists()
