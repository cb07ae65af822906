"""Ids by which rows of two files belong together."""

from __future__ import annotations

import re
import unicodedata
import uuid

_WHOLE = re.compile(r"[+-]?\d+\.0*")
_UUID = re.compile(r"\{?[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\}?")
_EXACT = 2**53  # floats above cannot tell neighbours apart


def same_id(value: object) -> str | None:
    """An id as text, the same for 7, 7.0, "7", "7.0" and b"7": a column of ids becomes floats where a value is missing,
    and texts in CSV. A UUID is one in any letters and braces, and so is a name whose accents stand apart (NFD). None
    for what is no id: nothing, nan, true, a list."""
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        text = unicodedata.normalize("NFC", value.strip("\ufeff").strip())
        if _UUID.fullmatch(text):
            return text.strip("{}").lower()
        whole = text.partition(".")[0]
        return (whole if _WHOLE.fullmatch(text) and abs(int(whole)) < _EXACT else text) or None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    return str(int(value)) if abs(value) < _EXACT and int(value) == value else str(value)
