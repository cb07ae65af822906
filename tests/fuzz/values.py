"""Hostile values, and documents and bytes that are almost right: what all kinds of input are made of."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

DIGITS, DEEP = "@digits@", "@deep@"
"""Stand for what Python's own writer cannot write: a number of 5,000 digits, and lists in lists."""

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 1e-308,
    float("nan"), float("inf"), "", " ", "a", "1", "nan", "\0", "\ud800", "\x1b[31mred", "é" * 300, "../../escaped",
    "/etc/passwd",
    "a/b", "..", "en", "true", "http://127.0.0.1:1/", [], {}, [[]], [None], [1, "a", None], [[1, 2]], {"": None},
    {"text": 1},
    {"a": {"b": []}}, ["a"] * 40, DIGITS, DEEP,
]  # fmt: skip
values = st.one_of(
    st.sampled_from(HOSTILE).map(copy.deepcopy),  # or a change would change what is drawn next, even put it into itself
    st.integers(-10, 10**6),
    st.floats(),
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
)


def dumped(document: Any, **options: Any) -> bytes:
    """A document as JSON, half pairs and NaN included."""
    text = json.dumps(document, **options)
    return text.replace(f'"{DIGITS}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000).encode()


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """The document with up to three of its values replaced, removed, doubled or put under other names."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(document)
        if not places:
            return draw(values)
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(("replace", "replace", "remove", "wrap", "add")))
        if how == "replace":
            holder[key] = draw(values)
        elif how == "remove":
            del holder[key]
        elif how == "wrap":
            holder[key] = [holder[key]]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = draw(values)
        else:
            holder.append(draw(values))
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [place for key, value in inside for place in [(document, key), *_places(value)]]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with up to four places overwritten, cut out, repeated or inserted."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(found)))
        stop = min(len(found), start + draw(st.sampled_from((1, 2, 4, 16, 512))))
        how = draw(st.sampled_from(("overwrite", "cut", "end", "repeat", "insert")))
        if how == "overwrite":
            found[start:stop] = draw(st.binary(min_size=stop - start, max_size=stop - start))
        elif how == "cut":
            del found[start:stop]
        elif how == "end":
            del found[start:]
        elif how == "repeat":
            found[start:start] = found[start:stop]
        else:
            found[start:start] = draw(st.binary(max_size=16))
    return bytes(found)


def json_bytes(document: Any) -> st.SearchStrategy[bytes]:
    """A JSON file that is almost this document: other values, damaged bytes, or neither JSON nor text."""
    return st.one_of(
        changed(document).map(dumped),
        changed(document).map(dumped),
        damaged(dumped(document)),
        values.map(dumped),
        st.binary(max_size=40),
    )
