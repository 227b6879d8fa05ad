"""What is no mistake in a row and still worth telling: counted, with the first place."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_exp.data.kinds import RowKind

# Either ends after a bounded number of characters, so that no text, however long, takes long.
EMAIL = re.compile(
    r"[\w.+-]@(?!example\.)(?:[a-z0-9-]{1,63}\.){1,5}(?!example\b|invalid\b|test\b)[a-z]{2,24}\b", re.IGNORECASE
)
"""An address outside the domains that are kept for examples (RFC 2606)."""
PHONE = re.compile(
    r"(?<![\w.+/-])(?:"
    r"\+(?=(?:[ .()-]{0,2}\d){8})\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}"
    r"|\d{3}[ .-]\d{3}[ .-]\d{4}"
    r")(?![\w-])"
)
"""A number with its country's code, or written as in North America."""
FEWEST_DIGITS = 7

_ALNUM = bytes(range(0x30, 0x3A)) + bytes(range(0x41, 0x5B)) + bytes(range(0x61, 0x7B))
_ASCII_REST = bytes(sorted(set(range(128)) - set(_ALNUM)))
_LOWER = bytes(range(256)).lower()
_PUNCTUATION = re.compile(rb"\xc2[\x80-\xbf]|\xe2[\x80\x81][\x80-\xbf]|\xe3\x80[\x80-\xbf]")
"""What UTF-8 makes of Latin-1's signs, General Punctuation and CJK Symbols and Punctuation."""


def strings(value: Any) -> Iterator[str]:
    """Yield the texts of a column: itself, or what its messages say, in their order, not who speaks."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "role":
                yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def normalised(text: str) -> bytes:
    """Return a text without case, spaces and punctuation, so that what differs in no more than these is the same.

    Compatible characters are one (NFKC). A text of nothing else stays what it is.
    """
    if text.isascii():
        plain = text.encode()
    else:
        plain = _PUNCTUATION.sub(b"", unicodedata.normalize("NFKC", text).casefold().encode())
    return plain.translate(_LOWER, _ASCII_REST) or text.encode()


@dataclass(frozen=True)
class Sight:
    """Something to look for in a row.

    Args:
        one: What one row is or has, as a sentence.
        many: What several are or have.
        seen: Whether it is in a row: as it stands in the file, as columns, these as JSON, of this kind.
        mend: What one may do about it.
    """

    one: str
    many: str
    seen: Callable[[Mapping[str, Any], Mapping[str, Any], bytes, RowKind], bool]
    mend: str = ""


def _equal_answers(_: Mapping[str, Any], columns: Mapping[str, Any], __: bytes, kind: RowKind) -> bool:
    answers = [columns[name] for name in kind.answers if name in columns]
    return len(answers) > 1 and all(answer == answers[0] for answer in answers[1:])


def _looks_like_another_kind(row: Mapping[str, Any], _: Mapping[str, Any], __: bytes, kind: RowKind) -> bool:
    return any(row.keys() >= answers for answers in _of_others(kind.answers))


@lru_cache
def _of_others(ours: tuple[str, ...]) -> list[set[str]]:
    from lora_exp.data.kinds import KINDS

    return [set(kind.answers) for kind in KINDS if kind.answers != ours]


def _has_email(_: Mapping[str, Any], columns: Mapping[str, Any], as_json: bytes, __: RowKind) -> bool:
    return b"@" in as_json and any("@" in text and EMAIL.search(text) for text in strings(list(columns.values())))


def _has_phone(_: Mapping[str, Any], columns: Mapping[str, Any], as_json: bytes, __: RowKind) -> bool:
    # Most rows have too few digits.
    if len(as_json) - len(as_json.translate(None, b"0123456789")) < FEWEST_DIGITS:
        return False
    return any(map(PHONE.search, strings(list(columns.values()))))


SIGHTS = {
    "equal_answers": Sight(
        "pair has two equal answers", "pairs have two equal answers", _equal_answers, "nothing can be learned from them"
    ),
    "another_kind": Sight(
        "row has the answers of another recipe too",
        "rows have the answers of another recipe too",
        _looks_like_another_kind,
        "they are left out; is it the right recipe, or the right file?",
    ),
    "emails": Sight("row has an e-mail address", "rows have e-mail addresses", _has_email),
    "phones": Sight("row has a phone number", "rows have phone numbers", _has_phone),
}
"""What is looked for in every good row, by the name in `data_report.json`."""


@dataclass
class Sightings:
    """Name to how often it was seen and the number of the first row."""

    found: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, name: str, number: int, times: int = 1) -> None:
        """Count something; rows come in their order."""
        before, first = self.found.get(name, (0, number))
        self.found[name] = (before + times, first)

    def extend(self, other: Sightings) -> None:
        """Count what was seen in the rows that follow."""
        for name, (times, first) in other.found.items():
            self.add(name, first, times)

    def look_at_lines(self, lines: bytes, first: int) -> None:
        """Look at how a file is written: line ends and a byte-order mark."""
        if first == 1 and lines.startswith(codecs.BOM_UTF8):
            self.add("byte_order_mark", 1)
        ends = lines.count(b"\r\n")
        if ends:
            self.add("crlf", first + lines.count(b"\n", 0, lines.index(b"\r\n")), ends)
