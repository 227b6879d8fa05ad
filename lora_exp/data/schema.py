"""`make schema`: write the row models out as JSON Schema, and their fields as the tables of SCHEMA.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lora_exp.data.conversations import (
    CompletionMessagesRow,
    ImplicitPreferenceRow,
    Message,
    MessagesRow,
    PreferenceMessagesRow,
)
from lora_exp.data.records import DataRecord
from lora_exp.data.texts import CompletionRow, InstructionRow, PreferenceRow

ROW_TYPES: dict[str, type[BaseModel]] = {
    "data_record": DataRecord,
    "completion_row": CompletionRow,
    "completion_messages_row": CompletionMessagesRow,
    "messages_row": MessagesRow,
    "instruction_row": InstructionRow,
    "preference_row": PreferenceRow,
    "preference_messages_row": PreferenceMessagesRow,
    "implicit_preference_row": ImplicitPreferenceRow,
}
"""Name of the schema file to the model."""
TABLES: dict[str, type[BaseModel]] = {**ROW_TYPES, "message": Message}
"""Name of the table in SCHEMA.md to the model."""
ROOT = Path(__file__).parents[2]


def schema_text(row_type: type[BaseModel]) -> str:
    """Return a model's JSON Schema (draft 2020-12), as the file holds it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **row_type.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def field_table(row_type: type[BaseModel]) -> str:
    """Return a model's fields as a Markdown table, those of objects inside it under dotted names."""
    schema = row_type.model_json_schema()
    rows = ["| field | type | required | what |", "|---|---|---|---|", *_rows(schema, schema.get("$defs", {}), "")]
    return "\n".join(rows) + "\n"


def _rows(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> list[str]:
    rows = []
    for name, field in schema["properties"].items():
        if "$ref" in field:
            inner = definitions[field["$ref"].rpartition("/")[2]]
            rows += _rows(inner, definitions, f"{prefix}{name}.")
            continue
        required = "yes" if name in schema.get("required", []) else "no"
        rows.append(f"| `{prefix}{name}` | {_type(field)} | {required} | {field.get('description', '')} |")
    return rows


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return re.sub(r"(?<!^)([A-Z])", r" \1", field["$ref"].rpartition("/")[2]).lower()
    if "const" in field:
        return f'`"{field["const"]}"`'
    if "enum" in field:
        return " or ".join(f'`"{value}"`' for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    words = "non-empty " if any(field.get(key) for key in ("minLength", "minItems", "pattern")) else ""
    if field["type"] == "array":
        return f"{words}list of {_type(field['items'])}s"
    kind = "ISO 8601 time" if field.get("format") == "date-time" else field["type"]
    return f"{words}{kind}"


def documented(text: str) -> str:
    """Return the text of SCHEMA.md with every table between `<!-- name -->` and `<!-- end -->` made anew."""
    for name, row_type in TABLES.items():
        head, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition("<!-- end -->")
        text = f"{head}{start}{field_table(row_type)}{end}{tail}"
    return text


def main() -> None:
    """Write the files."""
    for name, row_type in ROW_TYPES.items():
        (ROOT / "schema" / f"{name}.schema.json").write_text(schema_text(row_type), encoding="utf-8")
    document = ROOT / "SCHEMA.md"
    document.write_text(documented(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
