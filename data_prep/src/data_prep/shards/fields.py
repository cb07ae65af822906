"""Values from outside, each checked for its type. A wrong one is a ValueError or TypeError that says what was found."""

from __future__ import annotations

import string


def shown(value: object) -> str:
    """A foreign value, short enough for a message."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_count(value: object) -> int:
    """A number of samples or bytes, as JSON's readers in other languages can hold it."""
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{shown(value)}, expected a whole number from 0 to 2^53")
    return value


def as_text(value: object) -> str:
    """A key, an extension, a language: as foreign tars have them, so perhaps not UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)}, expected a text")
    return value


def as_name(value: object) -> str:
    """A name that becomes a path, or is looked up."""
    if not (name := as_text(value)) or not name.isprintable():
        raise ValueError(f"{shown(name)}, expected a name of printable characters")
    return name


def as_hash(value: object) -> str:
    """A sha256 in hex digits."""
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= set(string.hexdigits):
        raise ValueError(f"{shown(value)}, expected a sha256 of 64 hex digits")
    return value
