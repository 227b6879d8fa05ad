"""What to tell of a file that has no mistake."""

from __future__ import annotations

from lora_exp.data.check import Looked
from lora_exp.data.duplicates import Finding, repeated_rows
from lora_exp.data.files import place
from lora_exp.data.sightings import SIGHTS
from lora_exp.errors import count

WRITING = {
    "byte_order_mark": "begins with a byte-order mark, which is left out",
    "crlf": "has Windows line ends (CR LF), which are left out",
}
"""How a file is written."""


def findings_of(looked: Looked) -> list[Finding]:
    """Return what to tell of rows by themselves."""
    found = []
    for name, what in WRITING.items():
        if name in looked.seen.found:
            number, first = looked.seen.found[name]
            found.append(Finding(name, number, f"the file {what}", place(looked.source, first)))
    for name, sight in SIGHTS.items():
        if name in looked.seen.found:
            number, first = looked.seen.found[name]
            what = count(number, sight.one, sight.many)
            found.append(Finding(name, number, what, place(looked.source, first), sight.mend))
    repeated = repeated_rows(looked)
    return [*found, repeated] if repeated else found
