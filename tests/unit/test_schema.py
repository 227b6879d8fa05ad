"""The documented schemas are the ones that the code checks."""

from __future__ import annotations

import json
import re

import pytest

from lora_exp.data.kinds import KINDS
from lora_exp.data.schema import ROOT, ROW_TYPES, TABLES, documented, schema_text


@pytest.mark.parametrize("name", ROW_TYPES)
def test_the_json_schema_is_not_stale(name: str) -> None:
    file = ROOT / "schema" / f"{name}.schema.json"
    assert file.read_text(encoding="utf-8") == schema_text(ROW_TYPES[name]), "run make schema"


def test_the_document_is_not_stale() -> None:
    text = (ROOT / "SCHEMA.md").read_text(encoding="utf-8")
    assert documented(text) == text, "run make schema"
    assert all(f"<!-- {name} -->\n| field" in text for name in TABLES)


def test_every_format_is_documented_by_its_name() -> None:
    formats = [each for kind in KINDS for each in kind.formats]
    assert {each.row for each in formats} == set(ROW_TYPES.values())
    text = (ROOT / "SCHEMA.md").read_text(encoding="utf-8")
    assert all(f"### {each.name}\n" in text for each in formats)
    assert {file.stem.removesuffix(".schema") for file in (ROOT / "schema").glob("*.json")} == set(ROW_TYPES)


def test_the_documents_examples_are_rows() -> None:
    text = (ROOT / "SCHEMA.md").read_text(encoding="utf-8")
    examples = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    assert len(examples) >= 3
    for row in examples:
        kind = next(kind for kind in KINDS if any(each.likeness(row)[0] for each in kind.formats))
        assert kind.recognise(row).row.model_validate(row).columns()
