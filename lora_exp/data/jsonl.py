"""From a line to an object, or to the reason why it is none."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterable
from typing import Any

from lora_exp.data.files import MAX_LINE_BYTES, TOO_LONG
from lora_exp.data.reasons import json_type

SHOWN = 20
"""Bad rows that are named one by one; the rest are counted."""

MAX_DEPTH = 64
"""Objects and lists inside one another; what is deeper breaks one library or another on the way."""

DEEP = f"is nested too deeply: more than {MAX_DEPTH} objects and lists inside one another"
NOT_FINITE = "a row may only have numbers that are finite"


def parse(line: bytes) -> dict[str, Any]:
    """Return the object on a line.

    Raises:
        ValueError: If it is none; the message says why.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(TOO_LONG)
    try:
        value = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise ValueError(_not_json(line, error)) from error
    except RecursionError as error:
        raise ValueError(DEEP) from error
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object, not {json_type(value)}")
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH and not _shallow(value):
        raise ValueError(DEEP)
    return value


def _not_json(line: bytes, error: json.JSONDecodeError) -> str:
    if b"\0" in line:
        return f"has NUL bytes (the first is byte {line.index(0) + 1} of the line): the file was not written whole"
    if line.startswith(codecs.BOM_UTF8):
        return "not JSON: begins with a byte-order mark, which only the start of a file may have"
    return f"not JSON: {error.msg} (column {error.colno})"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"not JSON: {name}; {NOT_FINITE}")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large; {NOT_FINITE}")
    return value


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:  # Python reads so many digits and no more
        raise ValueError(f"has a number of {len(text):,} digits") from error


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int, strict=True
)


def _shallow(value: object) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [item for outer in level for item in _items(outer) if isinstance(item, dict | list)]
        if not level:
            return True
    return False


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
