"""The jobs of a process share one base: loaded once, bitwise untouched, and no job can tell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_exp.engine import support
from lora_exp.engine.probe import Probe
from lora_exp.models import policy as room
from lora_exp.models.shared import SHARED_BASE
from tests.few import ROWS
from tests.runs import build_trainer, run_in

JOB = ["tracker=none", "recipe=dpo", "trainer.max_steps=3", "samples.num_prompts=0", "recipe.max_length=128"]
JOB += ["trainer.eval_strategy=no", "trainer.learning_rate=1e-2", *ROWS]
QUANTS = ("none", "8bit", "4bit")


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Start without a base, and count how often one is loaded."""
    SHARED_BASE.forget()
    counted: list[str] = []
    load_base = room.load_base

    def counting(config: Any, *arguments: Any) -> Any:
        counted.append(config.pretrained_model_name_or_path)
        return load_base(config, *arguments)

    monkeypatch.setattr(room, "load_base", counting)
    yield counted
    SHARED_BASE.forget()


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(folder / "adapter" / "adapter_model.safetensors")
    return weights


@pytest.mark.parametrize("quant", QUANTS)
def test_a_job_on_a_shared_base_is_bitwise_the_job_alone(tmp_path: Path, quant: str, loads: list[str]) -> None:
    job = [*JOB, f"quant={quant}", "recipe.beta=0.5"]
    alone = adapter(run_in(tmp_path / "alone", job).folder)
    SHARED_BASE.forget()
    run_in(tmp_path / "before", [*JOB, f"quant={quant}", "lora.r=4", "seed=7"])
    second = adapter(run_in(tmp_path / "second", job).folder)
    assert len(loads) == 2, "alone and before; the second job found the base"
    assert alone.keys() == second.keys()
    assert all(torch.equal(alone[name], second[name]) for name in alone)


@pytest.mark.parametrize("quant", QUANTS)
def test_training_leaves_the_shared_base_bitwise_untouched(tmp_path: Path, quant: str) -> None:
    trainer = build_trainer(tmp_path, [*JOB, f"quant={quant}"])
    trainer.train()
    assert SHARED_BASE.untouched()


def test_a_base_that_was_written_into_is_loaded_afresh(tmp_path: Path, loads: list[str]) -> None:
    trainer = build_trainer(tmp_path / "1", JOB)
    next(trainer.model.get_base_model().parameters()).data.view(-1)[0] += 1
    assert not SHARED_BASE.untouched()
    build_trainer(tmp_path / "2", JOB)
    assert len(loads) == 2


def test_what_a_job_does_to_modules_stays_in_the_job(tmp_path: Path) -> None:
    first = build_trainer(tmp_path / "1", JOB).model.get_base_model()
    first.config.use_cache = True
    first.model.layers[0].mlp.forward = None
    second = build_trainer(tmp_path / "2", JOB).model.get_base_model()
    assert second.config.use_cache is False
    assert callable(second.model.layers[0].mlp.forward)
    assert first.model.embed_tokens.weight.data_ptr() == second.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    "changed", [["quant=8bit"], ["model.dtype=bfloat16"], ["model.embedded.seed=9"], ["lora=pissa"]], ids=str
)
def test_another_base_is_loaded(tmp_path: Path, changed: list[str], loads: list[str]) -> None:
    build_trainer(tmp_path / "1", [*JOB, "trainer.bf16=false"])
    build_trainer(tmp_path / "2", [*JOB, "trainer.bf16=false", *changed])
    assert len(loads) == 2


def test_pissa_does_not_write_into_what_the_next_job_finds(tmp_path: Path, loads: list[str]) -> None:
    build_trainer(tmp_path / "1", JOB)
    build_trainer(tmp_path / "2", [*JOB, "lora=pissa"])
    third = build_trainer(tmp_path / "3", JOB).model.get_base_model()
    SHARED_BASE.forget()
    alone = build_trainer(tmp_path / "4", JOB).model.get_base_model()
    for mine, theirs in zip(third.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_new_weights_under_an_old_name_are_loaded(tmp_path: Path, loads: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    from lora_exp.models.source import model_files
    from tests.runs import composed

    model = tmp_path / "model"
    with model_files(room_config(composed(JOB))) as files:
        import shutil

        shutil.copytree(files, model)
    job = [*JOB, "model=custom", f"model.pretrained_model_name_or_path={model}"]
    before = build_trainer(tmp_path / "1", job).model.get_base_model().model.embed_tokens.weight[0].clone()
    weights = AutoModelForCausalLM.from_pretrained(model)
    weights.model.embed_tokens.weight.data[0] += 1
    weights.save_pretrained(model)
    after = build_trainer(tmp_path / "2", job).model.get_base_model().model.embed_tokens.weight[0]
    assert len(loads) == 2
    assert not torch.equal(before, after)


def room_config(composed: Any) -> Any:
    from lora_exp.validation import validate

    return validate(composed).model


def test_token_ids_are_made_once_for_the_same_rows(tmp_path: Path) -> None:
    first, again, shorter = (
        build_trainer(tmp_path / str(length), [*JOB, "engine=padded", f"recipe.max_length={length}"]).train_dataset
        for length in (128, 128, 64)
    )
    assert first is again
    assert shorter is not first


def test_the_packed_engine_is_tried_once_for_each_kind_of_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "_FOUND", {})
    reason, tried = Probe.reason, []
    monkeypatch.setattr(Probe, "reason", lambda probe: tried.append(probe) or reason(probe))
    engines = []
    for number, change in enumerate(("recipe.beta=0.5", "seed=7", "lora.r=4", "recipe.beta=0.2")):
        engines.append(run_in(tmp_path / str(number), [*JOB, change]).results.run["engine"])
    assert len(tried) == 2, "another seed or loss is the same model; another rank is not"
    assert engines == ["packed"] * 4


def test_what_the_packed_engine_was_refused_for_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_FOUND", {})
    answers = iter(["no such mask"])
    monkeypatch.setattr(Probe, "reason", lambda _: next(answers))
    engines = [run_in(tmp_path / beta, [*JOB, f"recipe.beta={beta}"]).results.run["engine"] for beta in ("0.1", "0.2")]
    assert engines == ["padded", "padded"]


def test_nothing_of_the_first_job_outlives_it(tmp_path: Path) -> None:
    """In a process of its own. What is there when the libraries have been loaded is never collected again."""
    script = f"""
import gc
from pathlib import Path
from tests.runs import run_in
run_in(Path({str(tmp_path)!r}) / "job", {[*JOB, "trainer.max_steps=1"]!r})
gc.collect()
names = [type(each).__name__ for each in gc.get_objects()]
print(gc.get_freeze_count() > 100_000, [name for name in names if "DPOTrainer" in name])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True []"
