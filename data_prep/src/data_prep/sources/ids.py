"""Ids by which rows of two files belong together."""

from __future__ import annotations

import re

_WHOLE = re.compile(r"[+-]?\d+\.0*")
_EXACT = 2**53  # floats above cannot tell neighbours apart


def same_id(value: object) -> str | None:
    """An id as text, the same for 7, 7.0, "7", "7.0" and b"7": a column of ids becomes floats where a value is missing,
    and texts in CSV. None for what is no id: nothing, nan, true, a list."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        text = value.strip()
        return (text.partition(".")[0] if _WHOLE.fullmatch(text) else text) or None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    return str(int(value)) if abs(value) < _EXACT and int(value) == value else str(value)
