"""What pydantic finds in a row, in words for the person who wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError


def json_type(value: object) -> str:
    """Return what JSON calls a value, with its article: `a string`. A data set has others too: `a datetime`."""
    names = {str: "a string", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    number = type(value) in (int, float)
    return names.get(type(value), "a number" if number else f"a {type(value).__name__}")


def reasons(error: ValidationError) -> str:
    """Return all that is wrong with a row in one line: `messages.2.content: is empty; tools: should be a list, ...`."""
    return "; ".join(map(_reason, error.errors()))


def _reason(item: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    given = json_type(item["input"])
    special = {
        "missing": "is missing",
        "string_too_short": "is empty",
        "too_short": "is empty",
        "string_type": f"should be a string, not {given}",
        "model_type": f"should be an object, not {given}",
        "dict_type": f"should be an object, not {given}",
        "list_type": f"should be a list, not {given}",
    }
    text = special.get(item["type"], item["msg"].removeprefix("Value error, "))
    if item["type"] == "literal_error":
        said = repr(item["input"]) if isinstance(item["input"], str) else given
        text = f"should be {item['ctx']['expected']}, not {said}"
    return f"{where}: {text}" if where else text
