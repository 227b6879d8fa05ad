"""The documented schemas are the ones that the code checks."""

from __future__ import annotations

import pytest

from lora_exp.data.schema import ROOT, ROW_TYPES, documented, schema_text


@pytest.mark.parametrize("name", ROW_TYPES)
def test_the_json_schema_is_not_stale(name: str) -> None:
    file = ROOT / "schema" / f"{name}.schema.json"
    assert file.read_text(encoding="utf-8") == schema_text(ROW_TYPES[name]), "run make schema"


def test_the_document_is_not_stale() -> None:
    text = (ROOT / "SCHEMA.md").read_text(encoding="utf-8")
    assert documented(text) == text, "run make schema"
    assert all(f"<!-- {name} -->\n| field" in text for name in ROW_TYPES)
