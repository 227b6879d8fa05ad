"""docs/SUPPORT.md is what the tests' own table says."""

from __future__ import annotations

import pytest

from tests import support
from tests.support import CASES, DECLINED, DEVICES, DOCUMENT, RAN_ON, VARIANTS, Case, document, outcome

ROOT = DOCUMENT.parents[1]


def test_the_document_is_not_stale() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run make support"


@pytest.mark.parametrize("name", ["README.md", "docs/DESIGN.md"])
def test_it_is_linked(name: str) -> None:
    assert "docs/SUPPORT.md" in (ROOT / name).read_text(encoding="utf-8")


def test_a_device_on_which_no_test_ran_is_not_run_and_has_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "RAN_ON", ("cpu",))
    case = Case("dpo", "8bit", "packed", "bfloat16", "cuda")
    assert outcome(case) == "not run"
    assert "| CUDA | not run |" in document()
    assert "## CUDA" not in document()
    monkeypatch.setattr(support, "RAN_ON", ("cpu", "cuda"))
    assert outcome(case) == "trained"
    assert "| CUDA | 36 combinations trained, 0 declined |" in document()
    assert "## CUDA" in document()


def test_every_device_is_named_and_every_refusal_is_of_some_case() -> None:
    text = document()
    assert set(RAN_ON) <= set(DEVICES)
    assert all(f"| {device.upper()} |" in text for device in DEVICES)
    declined = {case.declined for case in (*CASES, *VARIANTS)} - {None}
    assert declined == {each.reason for each in DECLINED}
    assert all(reason in text for reason in declined)
