"""No secret of the environment or the config gets into a text that is written; what is none stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_exp.compose import Composer
from lora_exp.config import CONF_DIR
from lora_exp.errors import Problem, UserError
from lora_exp.run_folder import RunFolder
from lora_exp.secrets.masking import is_secret_name, masked, masked_config
from lora_exp.secrets.refusal import secret_problems
from lora_exp.tracking.base import ActiveRun, Ending, Guarded

SECRET = "planted-value-0001"
NAMES = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "MY_SECRET",
    "PASSWORD",
    "PGPASSWORD",
    "mysql_password",
    "SSH_PASSPHRASE",
    "OPENAI_APIKEY",
    "KEY",
    "SMTP_PASS",
    "AZURE_CONNECTION_STRING",
    "APP_CREDENTIALS",
)
ORDINARY = (
    "PATH",
    "HOME",
    "PWD",
    "OLDPWD",
    "MONKEY",
    "TOKENIZERS_PARALLELISM",
    "KEYBOARD",
    "PASSED",
    "LANG",
    "eos_token",
    "pad_token",
    "additional_special_token",
    "max_tokens",
    "author",
)
SHAPES = {
    "https://me:hunter2secret@host/rows.jsonl": "hunter2secret",
    "postgresql://me:hunter2secret@host:5432/db": "hunter2secret",
    "https://host/rows.jsonl?X-Amz-Signature=abcdef0123&x=1": "abcdef0123",
    "https://host/rows?token=abcdef0123": "abcdef0123",
    "Authorization: Bearer abcdef0123": "abcdef0123",
    "{'authorization': 'Basic YWxhZGRpbjpvcGVu'}": "YWxhZGRpbjpvcGVu",
    "curl -H 'Bearer abcdefghijklmnop0123'": "abcdefghijklmnop0123",
    "hf_abcdefghijklmnopqrstuvwxyz": "hf_abcdefghijklmnopqrstuvwxyz",
    "wandb_v1_abcdefghijklmnopqrstuvwxyz": "wandb_v1_abcdefghijklmnopqrstuvwxyz",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "sk-proj-abcdefghijklmnop0123456789": "sk-proj-abcdefghijklmnop0123456789",
    "AKIAIOSFODNN7EXAMPLE": "AKIAIOSFODNN7EXAMPLE",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----": "MIIE",
}
HARMLESS = (
    "http://localhost:8080/a@b",
    "ssh://git@github.com/me/it",
    "hf://datasets/me/rows@main/train.parquet",
    "a bearer of news",
    "sk-learn-is-a-library-of-many-models",
    "eos_token: <|im_end|>",
    "token=5",
    "pkg://lora_exp.data.sample",
    "me@example.com",
    "s3://bucket/rows.jsonl",
    "the key is under the mat",
    "reset your password: it is in the mail",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_with_the_name_of_a_secret_is_masked_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, SECRET)
    facts = {"error": f"refused: {SECRET}!", "deep": [{"x": (SECRET, 1, None, 0.5, True)}], SECRET: 1}
    assert masked(facts) == {
        "error": f"refused: ${{oc.env:{name}}}!",
        "deep": [{"x": [f"${{oc.env:{name}}}", 1, None, 0.5, True]}],
        SECRET: 1,
    }


@pytest.mark.parametrize("name", ORDINARY)
def test_other_variables_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_secret_name(name)
    monkeypatch.setenv(name, SECRET)
    assert masked(SECRET) == SECRET


@pytest.mark.parametrize("value", ["short", "", "/run/secrets/token", "~/.ssh/id_ed25519"])
def test_a_value_that_is_no_secret_is_left_alone(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", value)
    assert masked(f"in {value}.") == f"in {value}."


def test_a_variable_is_known_by_the_shape_of_its_value_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE", "postgres://me:hunter2secret@host/db")
    assert masked("at postgres://me:hunter2secret@host/db now") == "at ${oc.env:DATABASE} now"


@pytest.mark.parametrize(("text", "secret"), SHAPES.items())
def test_what_looks_like_a_secret_is_masked(text: str, secret: str) -> None:
    assert secret not in masked(f"x {text} y")
    assert masked(masked(text)) == masked(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_does_not_stays(text: str) -> None:
    assert masked(text) == text


@given(text=st.text())
def test_masking_twice_is_masking_once(text: str) -> None:
    assert masked(masked(text)) == masked(text)


def test_secrets_of_the_home_folder_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lora_exp.secrets.masking import _stored

    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0123456789abcdef0123456789abcdef\n")
    (tmp_path / ".netrc").chmod(0o600)
    (tmp_path / "token").write_text("an-odd-token-of-the-hub\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    _stored.cache_clear()
    assert masked("0123456789abcdef0123456789abcdef, an-odd-token-of-the-hub") == "***, ***"
    monkeypatch.undo()
    _stored.cache_clear()


# The config ------------------------------------------------------------------------------------------


@given(
    text=st.text(st.sampled_from("\\${}'\": #-aé\n\t,[]&*!|>%@`")), secret=st.text(st.sampled_from("\\${}'\":# aé,|"))
)
def test_a_config_that_is_read_back_is_the_same(text: str, secret: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_TEXT", text)
        patch.setenv("A_TOKEN", f"planted{secret}0001")
        values = {
            "in": ["x ${oc.env:A_TOKEN} y"],
            "text": "${oc.env:A_TEXT}",
            "other": 1.5e-5,
            "none": None,
            "yes": "yes",
        }
        composed = OmegaConf.create(values)
        written = OmegaConf.to_yaml(masked_config(composed))
        assert "planted" not in written
        read = OmegaConf.create(written)
        assert OmegaConf.to_container(read, resolve=True) == OmegaConf.to_container(composed, resolve=True)


REFUSED = [
    (["+trainer.hub_token=abc"], {}, "trainer.hub_token", "is a secret by its name", "HF_TOKEN=..."),
    (["+trainer.hub_token='${oc.env:MY_TOKEN}'"], {"MY_TOKEN": SECRET}, "trainer.hub_token", "is a secret", "HF_TOKEN"),
    (["tracker.notes=hf_abcdefghijklmnopqrstuvwxyz"], {}, "tracker.notes", "holds a password or a token", "${oc.env:"),
    (
        [f"tracker.notes='my {SECRET}'"],
        {"WANDB_API_KEY": SECRET},
        "tracker.notes",
        "the value of $WANDB_API_KEY",
        "${oc.env:WANDB_API_KEY}",
    ),
    (
        [f"tracker.tags=[a,{SECRET}]"],
        {"MY_SECRET": SECRET},
        "tracker.tags",
        "the value of $MY_SECRET",
        "${oc.env:MY_SECRET}",
    ),
    (
        ["data=hub", "data.path='https://me:hunter2@host/rows'"],
        {},
        "data.path",
        "holds a password",
        "${oc.env:DATA_PASSWORD}",
    ),
    (
        ["data=hub", "data.path=json", "+data.data_files.train='https://host/r?token=abcdef'"],
        {},
        "data.data_files.train",
        "holds a password",
        "_TOKEN",
    ),
    (
        ["data=hub", "data.path='https://me:${oc.env:MINE}@host/rows'"],
        {"MINE": "hunter2hunter2"},
        "data.path",
        "no secret by its name",
        "MINE_PASSWORD",
    ),
    (
        ["data=hub", "data.path='https://me:${oc.env:MY_PASSWORD,hunter2}@host/rows'"],
        {},
        "data.path",
        "holds a password",
        "_PASSWORD",
    ),
    (
        ["hydra.job.env_copy=[HF_TOKEN,PATH]"],
        {"HF_TOKEN": SECRET},
        "hydra.job.env_copy",
        "copy the value of $HF_TOKEN into",
        "leave it out",
    ),
    (["+hydra.job.env_set.MY_TOKEN=abc"], {}, "hydra.job.env_set.MY_TOKEN", "is a secret by its name", "MY_TOKEN=..."),
]


@pytest.mark.parametrize(
    ("overrides", "environment", "where", "what", "mend"), REFUSED, ids=lambda value: str(value)[:50]
)
def test_a_secret_in_the_config_is_refused_with_its_mend_and_not_repeated(
    composer: Composer,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    environment: dict[str, str],
    where: str,
    what: str,
    mend: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        composer.compose(overrides, check_values=True)
    (problem,) = caught.value.problems
    assert problem.where == where
    assert what in problem.what
    assert mend in problem.mend
    assert not any(secret in str(problem) for secret in ("abc", "hunter2", SECRET, "abcdef"))


def test_a_password_that_comes_from_the_environment_is_taken(
    composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_PASSWORD", SECRET)
    overrides = ["data=hub", "data.path=json", "+data.data_files.train='https://me:${oc.env:DATA_PASSWORD}@host/r'"]
    composed = composer.compose(overrides, check_values=True)
    assert composed.data.data_files.train == f"https://me:{SECRET}@host/r"
    written = masked_config(composed)
    assert SECRET not in OmegaConf.to_yaml(written)
    assert OmegaConf.create(OmegaConf.to_yaml(written)).data.data_files.train == composed.data.data_files.train


@pytest.mark.parametrize("file", sorted(CONF_DIR.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF_DIR)))
def test_none_of_our_own_keys_is_taken_for_a_secret(file: Path) -> None:
    config: Any = OmegaConf.to_container(OmegaConf.load(file))
    assert secret_problems({name: value for name, value in (config or {}).items() if name != "hydra"}) == []


# Where it is written ---------------------------------------------------------------------------------


def test_the_error_of_a_run_is_written_without_the_secret_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_jsonl("samples.jsonl", [{"prompt": SECRET}])
    with pytest.raises(RuntimeError), folder.open("", resumed=False):
        raise RuntimeError(f"401 for https://me:hunter2@host with {SECRET}")
    error = json.loads((tmp_path / "run" / "run.json").read_text())["error"]
    assert error == "RuntimeError: 401 for https://me:***@host with ${oc.env:MY_TOKEN}"
    assert SECRET not in (tmp_path / "run" / "samples.jsonl").read_text()


class Told(ActiveRun):
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def log(self, metrics: Any, step: int) -> None:
        raise OSError(f"401: bad key {SECRET}")

    def summarize(self, summary: Any) -> None:
        self.heard.append(summary)

    def table(self, name: str, rows: Any) -> None:
        self.heard.append(rows)

    def finish(self, status: Ending) -> None:
        pass


def test_a_tracker_is_told_no_secret_and_its_failure_repeats_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKER_API_KEY", SECRET)
    told = Told()
    run = Guarded(told, "told")
    run.summarize({"note": SECRET})
    run.table("samples", [{"prompt": f"x {SECRET}"}])
    run.log({}, 1)
    assert told.heard == [{"note": "${oc.env:TRACKER_API_KEY}"}, [{"prompt": "x ${oc.env:TRACKER_API_KEY}"}]]
    assert run.failure is not None
    assert SECRET not in run.failure


def test_a_problem_can_be_told_without_its_value() -> None:
    assert str(masked(str(Problem("data.path", "cannot be read: https://me:hunter2@host")))).endswith("me:***@host")
