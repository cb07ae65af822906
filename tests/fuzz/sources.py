"""Data sets as other libraries write them: Hugging Face's rows, parallel text, retrieval sets, MDS shards."""

from __future__ import annotations

import io
import struct
from functools import cache
from pathlib import Path
from typing import Any

from fuzz.data_sets import sound
from fuzz.harness import Files, Kind, all_of, command
from fuzz.images import picture
from fuzz.values import changed, damaged, dumped
from hypothesis import strategies as st

_ROWS: list[dict[str, Any]] = [
    {"translation": {"en": "a dog", "de": "ein Hund"}},
    {"query": "q", "passages": {"is_selected": [1, 0], "passage_text": ["yes", "no"]}},
    {"query": "q", "positive_passages": [{"title": "t", "text": "yes"}], "negative_passages": [{"text": "no"}]},
    {"query": "q", "pos": ["yes"], "neg": ["no"], "pos_scores": [2.0], "neg_scores": [1.0]},
    {"query": "q", "positive": "yes", "negative_1": "no", "score": [2.0, 1.0]},
    {"sentence1": "a", "sentence2": "b", "label": 1, "language": "de"},
]
_UNIT = '<tu><tuv xml:lang="de"><seg>ein <hi>Hund</hi></seg></tuv><tuv xml:lang="en"><seg>a dog</seg></tuv></tu>'
_TMX = f'<?xml version="1.0"?><tmx version="1.4"><header srclang="de"/><body>{_UNIT}{_UNIT}</body></tmx>'.encode()
_PARTS: dict[str, list[Any]] = {
    "corpus.jsonl": [{"_id": "d1", "title": "T", "text": "yes"}, {"_id": "d2", "title": "", "text": "no"}],
    "queries.jsonl": [{"_id": "q1", "text": "What?"}],
}
_QRELS = b"query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\n"


def _import(folder: Path) -> None:
    from data_prep.cli import main

    name = (folder / "importer").read_text()
    where: list[object] = [folder] if name in ("beir", "mds") else sorted(folder.glob("in*"))
    options = ["--negatives", 1] if name in ("hf", "beir", "mds") else []
    arguments = ["import", name, *where, *options, "--out", "made", "--workers", 1]
    all_of(lambda: command(main, *arguments), lambda: sound(Path("made")))


def _mds() -> tuple[dict[str, Any], bytes]:
    """Index and shard of one sample."""
    image = picture("PNG")
    sample = struct.pack("<II", 5, len(image)) + b"a dog" + image + struct.pack("<q", 7)
    raw = struct.pack("<III", 1, 12, 12 + len(sample)) + sample
    shard: dict[str, Any] = {"version": 2, "format": "mds", "compression": None, "samples": 1, "hashes": []}
    shard |= {"raw_data": {"basename": "shard.mds", "bytes": len(raw)}, "zip_data": None}
    shard |= {"column_names": ["caption", "image", "n"], "column_encodings": ["str", "png", "int"]}
    return {"version": 2, "shards": [{**shard, "column_sizes": [None, None, 8]}]}, raw


@cache
def _table(form: str) -> bytes:
    """Two images with captions, as the datasets library writes them."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"image": {"bytes": picture("PNG"), "path": None}, "caption": text} for text in ("a dog", "a cat")]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
    buffer = io.BytesIO()
    if form == "in.parquet":
        pyarrow.parquet.write_table(table, buffer)
    else:
        with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
    return buffer.getvalue()


def _lines(rows: list[Any]) -> bytes:
    return b"".join(dumped(row) + b"\n" for row in rows)


def _valid() -> list[Files]:
    index, raw = _mds()
    return [
        {"importer": b"hf", "in.jsonl": _lines(_ROWS)},
        *({"importer": b"hf", form: _table(form)} for form in ("in.parquet", "in.arrow")),
        {"importer": b"tmx", "in.tmx": _TMX},
        {"importer": b"moses", "in.de": b"ein Hund\n", "in.en": b"a dog\n"},
        {"importer": b"mds", "index.json": dumped(index), "shard.mds": raw},
        {"importer": b"beir", "qrels.train.tsv": _QRELS, **{name: _lines(rows) for name, rows in _PARTS.items()}},
    ]


@st.composite
def _cases(draw: st.DrawFn) -> Files:
    files = dict(draw(st.sampled_from(_valid())))
    rows = {"in.jsonl": _ROWS, **_PARTS, "index.json": [_mds()[0]]}
    for name in sorted(files.keys() - {"importer"}):
        if name in rows and draw(st.booleans()):
            files[name] = _lines([draw(st.one_of(st.just(row), changed(row))) for row in rows[name]])
        elif draw(st.booleans()):
            files[name] = draw(damaged(files[name]))
    return files


KINDS = [Kind("sources", _import, _valid, _cases)]
