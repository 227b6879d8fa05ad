"""Where a model and an adapter are looked for, and what is said where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_exp.config import CONF_DIR, ModelConfig
from lora_exp.data.cache import Cache
from lora_exp.errors import Problem, UserError
from lora_exp.models.source import adapter_dir, cache_dir, fetched_dir, is_fetched, locate, model_files

NAME = "an-owner/A-Model"


def config(name: str = NAME, **keys: Any) -> ModelConfig:
    return ModelConfig(pretrained_model_name_or_path=name, **keys)


def option(name: str) -> ModelConfig:
    """Return a conf/model option."""
    files = [OmegaConf.load(CONF_DIR / "model" / f"{each}.yaml") for each in ("base", name)]
    container = OmegaConf.to_container(OmegaConf.merge(*files))
    assert isinstance(container, dict)
    container.pop("defaults")
    return ModelConfig.model_validate(container)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep fetched models in a folder of the test's own, and work beside it."""
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


def refusal(model: ModelConfig) -> Problem:
    with pytest.raises(UserError) as caught:
        locate(model)
    (problem,) = caught.value.problems
    assert problem.where == "model.pretrained_model_name_or_path"
    assert problem.mend
    return problem


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


# Models.


def test_a_model_that_is_nowhere_names_the_command_that_fetches_it() -> None:
    problem = refusal(option("smollm2_135m"))
    assert "hub cannot be reached" in problem.what
    assert "python -m lora_exp.fetch model=smollm2_135m" in problem.mend


def test_a_model_that_is_nowhere_and_cannot_be_fetched_names_one_that_is_here() -> None:
    problem = refusal(config())
    assert NAME in problem.what
    assert "model=tiny" in problem.mend
    assert "fetch" not in problem.mend


def test_a_fetched_model_is_found_by_its_name(cache: Path) -> None:
    folder = make_model(fetched_dir(config()))
    assert folder.is_relative_to(cache)
    assert Path(locate(config())) == folder


def test_a_fetch_that_was_cut_off_is_no_model(cache: Path) -> None:
    fetched_dir(config()).mkdir(parents=True)
    assert refusal(config())


def test_two_models_never_share_a_fetched_folder() -> None:
    names = ["a/b", "a/b/c", "ab", "b/a", "a/c"]
    assert len({fetched_dir(config(name)) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["{}", "./mine", "mine"], ids=["absolute", "./", "relative"])
def test_a_folder_can_be_named(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "work" / "mine")
    assert Path(locate(config(name.format(folder)))).resolve() == folder


@pytest.mark.parametrize("name", ["./mine", "/no/such/folder", "../mine", "~/no_such_folder_at_all"])
def test_a_folder_that_is_not_there_is_told_without_asking_the_hub(name: str) -> None:
    assert refusal(config(name)).what == f"there is no folder {name}"


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in refusal(config(str(tmp_path))).what


def test_a_name_that_no_model_can_have_is_a_user_error() -> None:
    assert refusal(config("not a name?"))


def test_an_embedded_model_is_a_folder_that_is_there_for_as_long_as_it_is_used() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny = option("tiny")
    with model_files(tiny) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert not Path(folder).exists()
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_an_embedded_model_is_the_same_each_time_and_draws_from_no_one_elses_seed(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    weights = []
    for _ in range(2):
        with model_files(option("tiny")) as folder:
            weights.append((Path(folder) / "model.safetensors").read_bytes())
    assert torch.equal(torch.rand(3), expected)
    assert weights[0] == weights[1]


# Adapters.


def make_adapter(folder: Path, base: str | None = NAME) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}), encoding="utf-8")
    (folder / "adapter_model.safetensors").touch()
    return folder


def adapter_refusal(model: ModelConfig) -> Problem:
    with pytest.raises(UserError) as caught:
        adapter_dir(model)
    (problem,) = caught.value.problems
    assert problem.where == "model.adapter"
    assert problem.mend
    return problem


def test_without_an_adapter_there_is_none() -> None:
    assert adapter_dir(config()) is None


def test_a_run_folder_stands_for_the_adapter_in_it(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "run" / "adapter")
    assert adapter_dir(config(adapter=str(tmp_path / "run"))) == adapter


def test_an_adapter_folder_can_be_named_itself(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "elsewhere")
    assert adapter_dir(config(adapter=str(adapter))) == adapter


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "there is no folder" in adapter_refusal(config(adapter=str(tmp_path / "nowhere"))).what


def test_a_folder_without_an_adapter_is_told(tmp_path: Path) -> None:
    assert "holds no adapter" in adapter_refusal(config(adapter=str(tmp_path))).what


@pytest.mark.parametrize("base", [NAME, f"/somewhere/else/{NAME.rpartition('/')[2]}", None, ""])
def test_an_adapter_of_the_same_base_or_of_an_unknown_one_is_taken(tmp_path: Path, base: str | None) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    assert adapter_dir(config(adapter=str(adapter))) == adapter


def test_an_adapter_of_another_base_is_refused_with_both_names(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", "an-owner/Another-Model")
    problem = adapter_refusal(config(adapter=str(adapter)))
    assert "an-owner/Another-Model" in problem.what
    assert NAME in problem.what


def test_an_adapter_whose_config_cannot_be_read_is_a_user_error(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")
    assert adapter_refusal(config(adapter=str(adapter)))


def test_a_user_without_a_home_folder_is_asked_for_a_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HOME", "LORA_EXP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # as in a container that runs as a number
    with pytest.raises(UserError) as caught:
        cache_dir()
    assert "LORA_EXP_CACHE=<folder>" in caught.value.problems[0].mend
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


def test_a_cache_folder_that_one_may_not_enter_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")  # root may enter any folder, so what the system answers is set

    monkeypatch.setattr("os.stat", refuse)
    assert not is_fetched(config())
    assert Cache(Path("closed"), 1_000).find("any") is None
