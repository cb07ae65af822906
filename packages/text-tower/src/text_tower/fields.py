"""Values out of JSON that others wrote: each is of the type that is expected, or one message names its file and key.
Names that become paths are checked here too, for reading and for writing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a value is expected to be: in words, and as a check."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e12


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _are_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


COUNT = Kind("a whole number, 1 to 2,147,483,647", _is_count)
NUMBER = Kind("a number", _is_number)
TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TEXTS = Kind("a list of names", lambda value: isinstance(value, list) and _are_texts(value))
TEXT_OF_NAME = Kind("an object, of names and texts", lambda v: isinstance(v, dict) and _are_texts(v.values()))


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
        raise ValueError(f"{where} has {key} {shown(value)}; expected {kind.words}")
    return value


def shown(value: object) -> str:
    """A value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def read_bytes(file: Path, most: int) -> bytes:
    """A file's content.

    Raises:
        ValueError: it is larger than `most` bytes.
    """
    with file.open("rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{file} has more than {most:,} bytes; expected a model's file of that name")
    return content


def parse(content: bytes, where: object) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is not UTF-8 or not JSON, has numbers that are none (NaN, Infinity, 1e999), text that cannot be
            written again (half of a surrogate pair), or is nested too deeply.
    """
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=_no_number, parse_float=_finite)
        if re.search(rb"\\u[dD][89a-fA-F]", content):
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} is not JSON of text (an escape is half of a surrogate pair: {error.reason})"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits} is too large a number")
    return number


def check_name(name: object, what: str) -> str:
    """A name that becomes a file's or a folder's: one step of a path, never out of the folder that it is in.

    Raises:
        ValueError: another one; the message says what it is the name of.
    """
    fits = isinstance(name, str) and 0 < len(name.encode("utf-8", "surrogatepass")) <= 200
    if not fits or not str(name).isprintable() or set(str(name)) & set("/\\") or name in (".", ".."):
        raise ValueError(
            f"{what} {shown(name)} cannot name a folder; expected 1 to 200 printable characters without / and \\"
        )
    return str(name)


def within(folder: Path, relative: Any, where: object) -> Path:
    """A path that a file in `folder` states, relative to it and below it; the folder itself if that is "" or ".".

    Raises:
        ValueError: no text, an absolute path, or one that leads out.
    """
    steps = relative.split("/") if isinstance(relative, str) else [".."]
    if ".." in steps or not str(relative).isprintable() or Path(str(relative)).is_absolute() or "\\" in str(relative):
        raise ValueError(f"{where} names the path {shown(relative)}; expected one within {folder}")
    return folder / str(relative)
