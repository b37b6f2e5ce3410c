"""User payloads as raw JSON: services store and forward them without decoding them."""

from __future__ import annotations

import msgspec

NULL = msgspec.Raw(b"null")
"""The JSON of an absent value. (msgspec does not allow ``Raw | None``.)"""


def raw_json(text: str | None) -> msgspec.Raw:
    """Stored JSON text as raw JSON; ``null`` for None."""
    return NULL if text is None else msgspec.Raw(text)


def json_text(raw: msgspec.Raw) -> str | None:
    """Raw JSON as text, the form in which it is stored; None for ``null``."""
    return None if raw == NULL else str(raw, "utf-8")


def json_bytes(raw: msgspec.Raw) -> bytes | None:
    """Raw JSON as bytes for a decoder; None for ``null``."""
    return None if raw == NULL else bytes(raw)
