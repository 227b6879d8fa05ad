"""Real runs, with secrets planted around them and hostile names in them: nothing gets out that should not."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from omegaconf import OmegaConf

from lora_exp.config import CONF_DIR
from lora_exp.errors import UserError
from lora_exp.models.embedded import build
from lora_exp.training.integrity import seal
from tests.few import ROWS
from tests.forked import ForkServer
from tests.runs import Finished, composed, run_in
from tests.smoke.test_training import SHORT

PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "HF_TOKEN": "hf_plantedPlantedPlantedPlanted01",
    "OPENAI_API_KEY": "planted-openai-key-0001",
    "MY_SERVICE_TOKEN": "planted-service-token-0002",
    "SIGNING_KEY": "planted-signing-key-0003",
    "CLIENT_SECRET": "planted/client+secret=0004",
    "PASSWORD": "planted password 0005",
    "DATA_PASSWORD": "planted-data-password-0006",
    "DATABASE_URL": "postgres://me:planted-url-0007@host/db",
}
BRIEF = ["samples.num_prompts=1", "samples.max_new_tokens=4", "trainer.max_steps=1"]
TRAINS = [*BRIEF, *ROWS]
TAKEN = ["tracker.notes='with ${oc.env:MY_SERVICE_TOKEN}'", 'tracker.tags=[a,"${oc.env:CLIENT_SECRET}"]']
"""Secrets that the config takes from the environment."""


LoraExp = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def lora_exp(fork_server: ForkServer, tmp_path: Path) -> LoraExp:
    """Run `python -m lora_exp` in the test's folder, with the secrets in its environment."""
    return partial(fork_server.run, cwd=tmp_path, **PLANTED, WANDB_MODE="offline")


def leaks(folder: Path, said: str) -> list[str]:
    """Return where a planted secret stands, in any usual spelling: file names, what is in files, the terminal."""
    texts = {str(path): path.name.encode() + path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(texts) > 5
    texts["the terminal"] = said.encode()
    values = [value.rpartition("@")[0].rpartition(":")[2] or value for value in PLANTED.values()]
    spelled = {
        each
        for value in values
        for each in (value, quote(value, safe=""), json.dumps(value)[1:-1], base64.b64encode(value.encode()).decode())
    }
    return [f"{value} in {place}" for value in spelled for place, text in texts.items() if value.encode() in text]


def test_no_planted_secret_is_in_anything_that_a_run_writes(lora_exp: LoraExp, tmp_path: Path) -> None:
    done = lora_exp("output_dir=run", *TRAINS, *TAKEN)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert leaks(tmp_path, done.stdout + done.stderr) == []
    assert "${oc.env:MY_SERVICE_TOKEN}" in (tmp_path / "run" / "config.yaml").read_text()

    again = subprocess.run(
        [sys.executable, "-m", "lora_exp.reproduce", "run"],
        cwd=tmp_path,
        env={**os.environ, **PLANTED, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "run-reproduced" / ".hydra" / "overrides.yaml").is_file(), "what resume= reads"
    resumed = lora_exp("resume=run", "trainer.max_steps=2")
    assert resumed.returncode == 0, resumed.stderr
    assert leaks(tmp_path, resumed.stdout + resumed.stderr + again.stdout + again.stderr) == []


@pytest.mark.parametrize(
    "data",
    [
        ["data.path='https://me:${oc.env:DATA_PASSWORD}@127.0.0.1:9/rows?token=${oc.env:MY_SERVICE_TOKEN}'"],
        ["data.path=json", "+data.data_files.train='https://me:${oc.env:DATA_PASSWORD}@127.0.0.1:9/rows.jsonl'"],
    ],
    ids=["path", "data_files"],
)
def test_no_planted_secret_is_in_anything_that_a_failed_run_writes(
    lora_exp: LoraExp, tmp_path: Path, data: list[str]
) -> None:
    rest = ["data=hub", "data.val_split=null", "trainer.eval_strategy=no", "objective=train_loss"]
    done = lora_exp("output_dir=run", *BRIEF, *data, *rest)
    assert done.returncode == 2, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert "me:${oc.env:DATA_PASSWORD}@" in (tmp_path / "run" / "config.yaml").read_text()
    assert leaks(tmp_path, done.stdout + done.stderr) == []


def test_no_planted_secret_is_in_an_error_of_the_system(lora_exp: LoraExp, tmp_path: Path) -> None:
    store = "store.path='/dev/null/${oc.env:CLIENT_SECRET}/x'"  # an error of the system, which names the path
    done = lora_exp("output_dir=store", "recipe=dpo", *TRAINS, store)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "${oc.env:CLIENT_SECRET}" in done.stderr
    assert leaks(tmp_path, done.stdout + done.stderr) == []


def test_a_secret_in_the_command_is_refused_before_anything_is_written(lora_exp: LoraExp, tmp_path: Path) -> None:
    for multirun in ([], ["-m", "seed=1,2"]):
        done = lora_exp(
            *multirun,
            f"+trainer.hub_token={PLANTED['HF_TOKEN']}",
            "tracker.notes=hf_" + "x" * 20,
        )
        assert done.returncode == 2
        assert "trainer.hub_token: is a secret by its name" in done.stderr
        assert "tracker.notes: holds a password or a token" in done.stderr
        assert PLANTED["HF_TOKEN"] not in done.stderr
        assert list(tmp_path.iterdir()) == []


# Pickles and code ------------------------------------------------------------------------------------


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded model, as one would have downloaded it."""
    folder = tmp_path_factory.mktemp("model")
    embedded = composed([]).model.embedded
    build(OmegaConf.to_container(embedded, resolve=True), folder)  # type: ignore[arg-type]
    return folder


def copy_of(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def named(folder: Path) -> list[str]:
    return ["tracker=none", "model=custom", f"model.pretrained_model_name_or_path={folder}", *TRAINS]


def test_a_base_that_is_a_pickle_is_refused_unread(model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(UserError) as caught:
        run_in(tmp_path / "run", named(folder))
    (problem,) = caught.value.problems
    assert "pytorch_model.bin" in problem.what
    assert "save_pretrained" in problem.mend
    assert not (tmp_path / "trapped").exists()
    assert pickle.loads((folder / "pytorch_model.bin").read_bytes()) is None
    assert (tmp_path / "trapped").exists(), "the trap must work for this test to mean anything"


@pytest.mark.parametrize("other", [False, True], ids=["alone", "beside another safetensors file"])
def test_an_adapter_that_is_a_pickle_is_refused_unread(finished: Finished, tmp_path: Path, other: bool) -> None:
    folder = copy_of(finished("recipe=sft", "quant=none", *SHORT).folder / "adapter", tmp_path / "pickled")
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "other.safetensors") if other else weights.unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(UserError) as caught:
        run_in(tmp_path / "run", ["tracker=none", f"model.adapter={folder}", *TRAINS])
    assert caught.value.problems[0].where == "model.adapter"
    assert caught.value.problems[0].mend
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_is_a_trap_is_not_sprung(finished: Finished, tmp_path: Path, name: str) -> None:
    done = finished("recipe=sft", "quant=none", *SHORT)
    folder = tmp_path / "run"
    shutil.copytree(done.folder, folder)
    checkpoint = folder / "checkpoints" / "checkpoint-4"
    (checkpoint / name).write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    seal(checkpoint)  # whoever sets a trap makes the checksums fit
    more = [each for each in done.overrides if not each.startswith("trainer.max_steps")]
    with pytest.raises(UserError) as caught:
        run_in(folder, [*more, f"resume={folder}", "trainer.max_steps=5"])
    assert caught.value.problems[0].where == str(checkpoint)
    assert "delete that folder" in caught.value.problems[0].mend
    assert not (tmp_path / "trapped").exists()


def test_rows_that_are_a_pickle_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    data = ["data=hub", "data.path=pandas", f"+data.data_files.train={tmp_path / 'rows.pkl'}", "data.val_split=null"]
    with pytest.raises(UserError, match="cannot be loaded"):
        run_in(tmp_path / "run", ["tracker=none", *BRIEF, *data, "trainer.eval_strategy=no", "objective=train_loss"])
    assert not (tmp_path / "trapped").exists()


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder that brings code of its own."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = copy_of(model, tmp_path / "with_code")
    facts = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**facts, "model_type": "own_llama", "auto_map": auto}))
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return folder


def test_code_of_a_model_is_not_run_unless_it_is_trusted(with_code: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run_in(tmp_path / "run", named(with_code))
    (problem,) = caught.value.problems
    assert problem.where == "model.trust_remote_code"
    assert "model.trust_remote_code=true" in problem.mend
    assert not (tmp_path / "ran").exists()


def test_code_that_is_trusted_is_named_in_the_header_and_in_the_report(
    with_code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_in(tmp_path / "run", [*named(with_code), "model.trust_remote_code=true"])
    assert (tmp_path / "ran").exists()
    assert "model.trust_remote_code=true" in capsys.readouterr().out.split("machine")[0]
    assert done.results.run["trust_remote_code"] is True
    assert "model.trust_remote_code=true" in (done.folder / "report.html").read_text()


# Paths -----------------------------------------------------------------------------------------------

TRACKERS = sorted({path.stem for path in (CONF_DIR / "tracker").glob("*.yaml")} - {"none"})
HOSTILE = "../../../escaped"


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("keys", [("name", "group"), ("project",)], ids=" ".join)
def test_no_name_at_a_tracker_leads_out_of_the_run_folder_and_no_tracker_keeps_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, tracker: str, keys: tuple[str, ...]
) -> None:
    cwd = tmp_path / "a" / "b" / "c"
    cwd.mkdir(parents=True)
    monkeypatch.chdir(cwd)
    for name, value in {**PLANTED, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRACKIO_DIR", str(cwd / "trackio"))
    names = [f"tracker.{key}={HOSTILE}" for key in keys] + TAKEN
    done = run_in(Path("run"), [f"tracker={tracker}", *names, *TRAINS, "samples.num_prompts=0"])
    assert done.results.run["status"] == "finished"
    said = capfd.readouterr()
    assert leaks(tmp_path, said.out + said.err) == []
    paths = (path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert [path for path in paths if "escaped" in path and not path.startswith("a/b/c/run/")] == []


@pytest.mark.parametrize(
    "link", ["metrics.jsonl", "checkpoints", ".hydra", "wandb", "adapter", "checkpoints/checkpoint-1"]
)
def test_a_link_out_of_the_folder_is_refused_and_not_followed(lora_exp: LoraExp, tmp_path: Path, link: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "run" / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / link).symlink_to(elsewhere)
    done = lora_exp("output_dir=run", *TRAINS)
    assert done.returncode == 2
    assert f"run/{link}: is a link that leads out of the run folder" in done.stderr
    assert list(elsewhere.iterdir()) == []
    with pytest.raises(UserError, match="is a link"):
        run_in(tmp_path / "run", ["tracker=none", *TRAINS])


def test_a_folder_that_is_itself_a_link_is_as_good_as_any(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    done = run_in(tmp_path / "run", ["tracker=none", *TRAINS])
    assert done.results.run["status"] == "finished"
    assert (tmp_path / "disk" / "adapter").is_dir()


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "..", "a\\b"])
def test_the_name_of_a_sweep_is_no_path(lora_exp: LoraExp, tmp_path: Path, name: str) -> None:
    done = lora_exp("-m", f"sweep.name='{name}'", "seed=1,2")
    assert done.returncode == 2
    assert "sweep.name" in done.stderr
    assert list(tmp_path.iterdir()) == []
