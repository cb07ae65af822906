"""JSON files that are one big list, cut into pieces for many processes.

Not ijson: it does not tell where in the file an element is, so every unit would have to read from the beginning. It
parses some 450 MB/s (yajl2_c); the scan here runs once for the file, at some 90 MB/s, and the pieces are parsed by the
standard library at 350 MB/s.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from data_prep.errors import UserError
from data_prep.shards.format import JsonObject, parse_json
from data_prep.sources.records import Dropped, Row
from data_prep.sources.tables import checked_file_stat

# A string that never ends reaches to the end of the file; were it no match, each of its quotes would be tried again.
_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


def list_pieces(path: str | Path, elements: int, *, key: str | None = None) -> Iterator[JsonObject]:
    """Pieces of so many elements (objects, lists) of the JSON list that a file is, or that its object has under `key`.

    Raises:
        UserError: the file cannot be read, is cut short, or has no such list.
    """
    path = Path(path)
    spans = _element_spans(path, key)
    number, stamped = 0, checked_file_stat(path)
    (start, _), span = next(spans), list(islice(spans, elements))
    while span:
        following = list(islice(spans, elements))
        if len(following) == 1 and following[0][0] == following[0][1]:  # the list's end alone
            span, following = [*span, *following], []
        # What stands between the elements belongs to a piece, too: a number is none, and is counted all the same.
        if start < span[-1][1]:
            yield {"file": str(path), **stamped, "start": start, "end": span[-1][1], "row": number}
        number, start, span = number + len(span), span[-1][1], following


def read_list(piece: JsonObject) -> Iterator[Row | Dropped]:
    """The elements of a piece of `list_pieces`."""
    path = Path(piece["file"])
    with path.open("rb") as file:
        file.seek(piece["start"])
        raw = file.read(piece["end"] - piece["start"])
    try:
        values = parse_json(b"[" + raw.strip(b", \t\r\n") + b"]")
    except ValueError:
        yield from _one_by_one(raw, path.name, piece["row"])
        return
    for number, value in enumerate(values, piece["row"]):
        yield f"{path.name}, element {number}", value


def _one_by_one(raw: bytes, name: str, first: int) -> Iterator[Row | Dropped]:
    """The elements of a piece that cannot be parsed as a whole: what is wrong with one costs that one."""
    for number, (start, end) in enumerate(_spans(raw), first):
        where = f"{name}, element {number}"
        try:
            yield where, parse_json(raw[start:end])
        except UnicodeDecodeError:
            yield Dropped("not UTF-8", where, content=raw[start:end])
        except ValueError:
            yield Dropped("not JSON", where, content=raw[start:end])


def _spans(raw: bytes) -> Iterator[tuple[int, int]]:
    """Where the objects and lists of a piece begin and end, by their brackets alone, and what stands between them."""
    depth = start = end = 0
    for token in _TOKENS.finditer(raw):
        text = token.group()
        if text in (b"[", b"{"):
            if not depth:
                start = token.start()
                yield from _between(raw, end, start)
            depth += 1
        elif text in (b"]", b"}"):
            depth -= 1
            if not depth:
                end = token.end()
                yield start, end
    yield from _between(raw, end, len(raw))


def _between(raw: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    if raw[start:end].strip(b", \t\r\n"):
        yield start, end


def _element_spans(path: Path, key: str | None) -> Iterator[tuple[int, int]]:
    """Where the list begins (twice), where its elements begin and end, by their brackets alone, and where it ends
    (twice). The file is memory-mapped."""
    checked_file_stat(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        depth, inside, start, name = 0, None, 0, b""  # `inside`: the depth of the list's elements, once it is found
        for token in _TOKENS.finditer(data):
            text = token.group()
            if text.startswith(b'"'):
                name = text if depth == 1 else name
            elif text in b"[{":
                depth += 1
                if inside is None:
                    if text == b"[" and (depth == 1 or (depth == 2 and key and name == json.dumps(key).encode())):
                        inside = depth
                        yield token.end(), token.end()
                elif depth == inside + 1:
                    start = token.start()
            else:
                depth -= 1
                if inside is not None and depth == inside:
                    yield start, token.end()
                elif inside is not None and depth < inside:
                    yield token.start(), token.start()
                    return
    raise UserError(
        f"{path}: is cut short, or holds no list{f' under {key!r}' if key else ''}; expected JSON of the source's form"
    )
