"""Text from outside - rows, names, errors of libraries - made safe to show."""

from __future__ import annotations

CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
"""To their escapes. A terminal obeys such characters: an ESC may move the cursor, or type; HTML cannot show them."""


def visible(text: str) -> str:
    """Return text with its control characters, but for tabs and line breaks, made visible."""
    return text.replace("\r\n", "\n").translate(CONTROL_CHARACTERS)
