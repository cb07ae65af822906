"""Values out of JSON that others wrote: each is of the type that is expected, or one message names its file and key."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LARGEST_JSON = 2**24
"""Bytes. The largest configuration that we know of has some kilobytes."""


class Kind(NamedTuple):
    """What a value is expected to be: in words, and as a check."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e12


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


COUNT = Kind("a whole number, 1 to 2,147,483,647", _is_count)
NUMBER = Kind("a number", _is_number)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
SIDES = Kind(
    "a side or two of them, whole numbers above 0",
    lambda v: _is_count(v) or (isinstance(v, list) and len(v) == 2 and all(map(_is_count, v))),
)
SIZE = Kind("three positive whole numbers", lambda v: isinstance(v, list) and len(v) == 3 and all(map(_is_count, v)))
PLAIN = Kind(
    "a number, a text, true, false, or a list of numbers",
    lambda v: isinstance(v, bool | str) or _is_number(v) or (isinstance(v, list) and all(map(_is_number, v))),
)


def field(values: Mapping[str, Any], key: str, kind: Kind, where: object, default: Any = ...) -> Any:
    """The value of `key`, of the kind expected; where it is left out, the default, also for null if that is empty.

    Raises:
        ValueError: another kind of value, or none and no default; it names `where` and the key.
    """
    if key not in values and default is ...:
        raise ValueError(f"{where} lacks {key}; expected {kind.words}")
    value = values.get(key)
    if key not in values or (value is None and not default):
        return default
    if not kind.fits(value):
        raise ValueError(f"{where}: {key} is {shown(value)}; expected {kind.words}")
    return value


def shown(value: object) -> str:
    """A value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ValueError: the file is too large, is not JSON, or holds no object.
    """
    with file.open("rb") as opened:
        content = opened.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError(f"{file} has more than {LARGEST_JSON:,} bytes; expected a configuration, of some kilobytes")
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=_no_number, parse_float=_finite)
        if re.search(rb"\\u[dD][89a-fA-F]", content):  # half of a surrogate pair cannot be written again
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore it or save the tower again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} does not describe a vision tower; expected an object")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits} is too large a number")
    return number
