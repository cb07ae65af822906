"""A caller's texts as a list of strings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any


def listed(texts: Iterable[Any], what: str = "texts") -> list[str]:
    """The texts in order: of a list, a tuple, another sequence, a numpy array of one dimension, a column such as a
    pandas Series, or an iterator.

    Raises:
        ValueError: a bare string, bytes, a mapping, a set, a table or anything else that is no sequence of texts; or an
            entry that is no string (its index is named).
    """
    kind = type(texts).__name__
    if isinstance(texts, str):
        raise ValueError(f"{what} is a single string; expected a list of strings: [text]")
    if isinstance(texts, bytes | bytearray | memoryview):
        raise ValueError(f"{what} is {kind}; expected a list of strings")
    if isinstance(texts, Mapping | Set) or hasattr(texts, "columns") or hasattr(texts, "column_names"):
        raise ValueError(f"{what} is a {kind}, whose parts are its keys or columns, or in no order; expected a list of "
                         "strings, such as list(table['caption'])")  # fmt: skip
    if (dimensions := getattr(texts, "ndim", 1)) != 1:
        raise ValueError(f"{what} is a {kind} of {dimensions} dimensions; expected a list of strings")
    try:
        entries = list(texts)
    except TypeError:
        raise ValueError(f"{what} is {texts!r}, a {kind}; expected a list of strings") from None
    for i, text in enumerate(entries):
        if not isinstance(text, str):
            raise ValueError(f"{what}[{i}] is {text!r}, a {type(text).__name__}; expected a string")
    return [str(text) for text in entries]  # numpy's strings are a subclass
