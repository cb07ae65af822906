"""Tables of texts and of captions: CSV, TSV, JSON lines and parquet, through the importers that read them."""

from __future__ import annotations

import gzip
import io
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

from fuzz.data_sets import sound
from fuzz.harness import Files, Kind, all_of, command
from fuzz.images import picture
from fuzz.values import changed, damaged, dumped, values
from hypothesis import strategies as st

_ROWS: list[dict[str, Any]] = [
    {"query": "ein Hund", "positive": "a dog", "negative_1": "a cat", "image": "a.png", "caption": "dog",
    "language": "de"},
    {"query": "zwei", "positive": "two, \"of\" them", "negative_1": "", "image": "a.png", "caption": "x\ny",
    "language": "en"},
]  # fmt: skip


def _import(folder: Path) -> None:
    """The importers `texts` and `images`, each of the folder's tables; then everything that reads the data set."""
    from data_prep.cli import main

    options = json.loads((folder / "options.json").read_bytes()) if (folder / "options.json").is_file() else []
    tables = [path for path in sorted(folder.iterdir()) if path.name.startswith("table.")]
    for table in tables:
        text = ("import", "texts", table, "--out", "texts", "--workers", 1, "--negatives", 1, *options)
        steps = [partial(command, main, *text), partial(sound, Path("texts"))]
        if table.suffix != ".parquet":
            image = ("import", "images", folder, "--table", table, "--out", "images", "--workers", 1, *options)
            steps += [partial(command, main, *image), partial(sound, Path("images"))]
        all_of(*steps)


@cache
def parquet(rows: tuple[str, ...]) -> bytes:
    """A parquet file of rows, each a JSON object; its columns get the types of what is in them."""
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(row) for row in rows]), buffer)
    return buffer.getvalue()


def _separated(rows: list[dict[str, Any]], mark: str) -> str:
    def cell(value: object) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in f'{mark}"\n\r') else text

    columns = list(rows[0])
    return "\n".join(mark.join(map(cell, row)) for row in [columns, *(list(row.values()) for row in rows)]) + "\n"


_PIECES = st.sampled_from(
    ('"', '""', ",", "\t", ";", "|", "\n", "\r", "\r\n", "\0", "\x1b[31m", "\ufeff", "a", "ein Hund", "../../escaped",
    "a.png",
     '"a', 'a"', "\x85", "\u2028", " ", "=cmd()", "query", "positive", "image", "caption")
)  # fmt: skip


@st.composite
def _text_table(draw: st.DrawFn) -> Files:
    ending, mark = draw(st.sampled_from((("csv", ","), ("tsv", "\t"), ("csv", ";"), ("csv", "|"))))
    text = _separated(_ROWS, mark)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + "".join(draw(st.lists(_PIECES, max_size=4))) + text[place:]
    charset = draw(st.sampled_from(("utf-8",) * 5 + ("utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-7")))
    content = text.encode(charset, "replace")
    content = draw(st.one_of(st.just(content), damaged(content)))
    return {f"table.{ending}": content}


@st.composite
def _lines(draw: st.DrawFn) -> Files:
    forms: list[Any] = [
        *_ROWS,
        ["ein Hund", "a dog"],
        ["a", "b", "c"],
        {"set": ["a", "b", "c"]},
        {"query": "a", "pos": ["b"], "neg": ["c"]},
    ]
    lines = draw(
        st.lists(
            st.sampled_from(forms).flatmap(changed).map(dumped) | values.map(dumped) | st.binary(max_size=9), max_size=4
        )
    )
    return {"table.jsonl": b"\n".join([*lines, b""])}


@st.composite
def _parquets(draw: st.DrawFn) -> Files:
    changes = draw(st.lists(st.sampled_from(sorted(_ROWS[0])), max_size=2, unique=True))
    columns = dict(_ROWS[0])
    for name in changes:  # one value a column: a column has one type
        columns[name] = draw(
            st.sampled_from((None, 1, 1.5, True, ["a"], [], {"a": 1}, {"a": None}, [["a"]], [None], "\0", "x" * 300))
        )
    rows = tuple([json.dumps(columns)] * draw(st.integers(0, 3)))
    content = parquet(rows)
    return {"table.parquet": draw(st.one_of(st.just(content), damaged(content)))}


@st.composite
def _cases(draw: st.DrawFn) -> Files:
    files = draw(st.one_of(_text_table(), _text_table(), _lines(), _parquets()))
    if not files.get("table.parquet") and draw(st.integers(0, 4)) == 0:
        name, content = next(iter(files.items()))
        packed = gzip.compress(content, mtime=0)
        files = {f"{name}.gz": draw(st.one_of(st.just(packed), damaged(packed)))}
    options = draw(
        st.lists(
            st.sampled_from(
                ("--delimiter=,", "--delimiter=\\t", "--delimiter=;;", "--delimiter=\"", "--encoding=utf-16",
                "--encoding=nothing",
                 "--encoding=cp1252", "--encoding=hex", "--encoding=utf-8-sig", "--encoding=utf-7", "--language=de",
                 "--language=a,b",
                 "--language=", "--encoding=idna", "--encoding=punycode", "--encoding=raw_unicode_escape")
            ),
            max_size=2, unique=True,
        )
    )  # fmt: skip
    options = options if draw(st.booleans()) else []
    if not options:
        return {**files, "a.png": picture("PNG")}
    return {**files, "a.png": picture("PNG"), "options.json": json.dumps(options).encode()}


def _valid() -> list[Files]:
    image = {"a.png": picture("PNG")}
    lines = b"".join(dumped(row) + b"\n" for row in _ROWS)
    return [
        {"table.csv": _separated(_ROWS, ",").encode(), **image},
        {"table.jsonl": lines, **image},
        {"table.csv.gz": gzip.compress(_separated(_ROWS, ",").encode(), mtime=0), **image},
        {"table.parquet": parquet(tuple(map(json.dumps, _ROWS))), **image},
    ]


KINDS = [Kind("tables", _import, _valid, _cases)]
