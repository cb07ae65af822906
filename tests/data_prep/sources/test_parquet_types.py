"""Parquet as Spark, Hive, pandas and databases write it: types of columns, folders that are columns, damaged pages."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from data_prep.errors import UserError
from pyarrow import parquet

QUERIES, TARGETS = ["what is ice", "café ☕"], ["frozen water", "a drink"]


def write(path: Path, **columns: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def pairs(found) -> list[tuple[str, str]]:
    return [
        (sample.content["query"][0]["text"], sample.content["target"][0]["text"])
        for sample in found.samples.get("text-pairs", [])
    ]


@pytest.mark.parametrize("title", ["hf", "texts"])
@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.binary_view(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.binary()),
    ],
    ids=str,
)
def test_texts_of_every_type_are_texts(run, tmp_path, title, kind):
    binary = "binary" in str(kind)
    query = pyarrow.array([text.encode() if binary else text for text in QUERIES]).cast(
        kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    )
    query = query.dictionary_encode() if pyarrow.types.is_dictionary(kind) else query
    write(tmp_path / "in/a.parquet", query=query, target=TARGETS)
    given = {"data": tmp_path / "in"} if title == "hf" else {"files": [tmp_path / "in"]}
    assert pairs(run(title, **given)) == list(zip(QUERIES, TARGETS, strict=True))


def test_bytes_that_are_no_text_cost_their_row_and_no_other(run, tmp_path, picture):
    image = pyarrow.array([{"bytes": picture(n), "path": None} for n in range(2)])
    write(tmp_path / "in/a.parquet", image=image, caption=[b"a dog", b"caf\xe9"], uuid=[b"\xff" * 16] * 2)
    found = run("hf", data=tmp_path / "in")
    assert [sample.captions for sample in found.samples["image-short"]] == [["a dog"]]
    assert found.dropped == {"caption is no text": 1}


def test_each_file_of_texts_is_read_by_its_own_columns(run, tmp_path):
    """Those of the first one would hide the labels of the third, and make positives of what is no match."""
    write(tmp_path / "in/a.parquet", query=["a"], target=["A"])
    write(tmp_path / "in/b.parquet", anchor=["b"], positive=["B"])
    write(tmp_path / "in/c.parquet", query=["c", "d"], target=["C", "not D"], label=[1, 0])
    found = run("hf", data=tmp_path / "in")
    assert pairs(found) == [("a", "A"), ("b", "B"), ("c", "C")]
    assert sum(found.dropped.values()) == 1


def test_folders_that_stand_for_columns_are_columns(run, tmp_path, picture):
    write(tmp_path / "in/language=de/label=1/part-0.parquet", query=["a"], target=["A"])
    write(tmp_path / "in/language=fr/label=0/part-0.parquet", query=["b"], target=["not B"])
    write(tmp_path / "in/language=__HIVE_DEFAULT_PARTITION__/label=1/part-0.parquet", query=["c"], target=["C"])
    found = run("hf", data=tmp_path / "in")
    assert sorted(pairs(found)) == [("a", "A"), ("c", "C")]
    assert sorted(sample.row.languages for sample in found.samples["text-pairs"]) == [("de",), ("und",)]
    assert pairs(run("texts", files=[tmp_path / "in"], out=tmp_path / "again")) == sorted(pairs(found))[::-1]
    image = pyarrow.array([{"bytes": picture(), "path": None}])
    write(tmp_path / "photos/lang=pt-BR/part-0.parquet", image=image, caption=["um cão"])
    (sample,) = run("hf", data=tmp_path / "photos", out=tmp_path / "third").samples["image-short"]
    assert sample.row.languages == ("pt",)


def test_maps_are_objects_and_one_that_is_not_needed_is_no_trouble(run, tmp_path, picture):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    image = pyarrow.array([{"bytes": picture(), "path": None}])
    by_language = pyarrow.array([[("en", "a dog"), ("pt-BR", "um cão")]], kind)
    write(tmp_path / "a/a.parquet", image=image, caption=by_language, meta=pyarrow.array([[("k", "v")]], kind))
    (sample,) = run("hf", data=tmp_path / "a").samples["image-short"]
    texts = [(text["text"], text["language"]) for text in sample.content["captions"]]
    assert texts == [("a dog", "en"), ("um cão", "pt")]
    write(tmp_path / "b/a.parquet", translation=pyarrow.array([[("en", "a"), ("de", "b")]], kind))
    assert pairs(run("hf", data=tmp_path / "b", out=tmp_path / "again")) == [("a", "b")]


def test_captions_by_what_are_no_languages_are_no_captions(run, tmp_path, picture):
    """As in FineVision and The Cauldron: the question would be a caption in the language "user"."""
    image = pyarrow.array([[{"bytes": picture(), "path": None}]])
    turns = pyarrow.array([[{"user": "What is this?", "assistant": "A dog."}]])
    write(tmp_path / "in/a.parquet", images=image, texts=turns)
    with pytest.raises(UserError, match="caption is no text"):
        run("hf", data=tmp_path / "in")
    named = run("hf", data=tmp_path / "in", caption_column="texts.assistant", out=tmp_path / "again")
    assert [sample.captions for sample in named.samples["image-short"]] == [["A dog."]]


def test_columns_of_which_nothing_is_known_are_named_before_anything_is_read(run, tmp_path):
    write(tmp_path / "in/a.parquet", instruction=QUERIES, output=TARGETS)
    with pytest.raises(UserError, match=r"none of its columns \(instruction, output\) is known for texts, or holds im"):
        run("hf", data=tmp_path / "in")
    named = run("hf", data=tmp_path / "in", query_column="instruction", target_column="output", out=tmp_path / "again")
    assert pairs(named) == list(zip(QUERIES, TARGETS, strict=True))
    write(tmp_path / "b/a.parquet", query=[None, "q"], target=["t", "t"])  # known, though the first row has no form
    assert pairs(run("hf", data=tmp_path / "b", out=tmp_path / "third")) == [("q", "t")]


def test_a_date_that_python_does_not_have_costs_nothing(run, tmp_path):
    late = pyarrow.array([2**62, 1], pyarrow.timestamp("us"))
    write(tmp_path / "in/a.parquet", query=QUERIES, target=TARGETS, when=late, day=[datetime.date(1, 1, 1)] * 2)
    assert pairs(run("hf", data=tmp_path / "in")) == list(zip(QUERIES, TARGETS, strict=True))


def test_a_page_whose_checksum_is_wrong_is_no_text(run, tmp_path):
    """Its bytes are texts like any other; only the checksum says that they are not those that were written."""
    path = tmp_path / "in/a.parquet"
    path.parent.mkdir()
    table = pyarrow.table({"query": [f"query {n:04}" for n in range(300)], "target": [f"{n:04}" for n in range(300)]})
    parquet.write_table(
        table, path, row_group_size=100, compression="none", use_dictionary=False, write_page_checksum=True
    )
    raw = bytearray(path.read_bytes())
    place = raw.index(b"query 0150")
    raw[place : place + 5] = b"quern"
    path.write_bytes(bytes(raw))
    found = run("texts", files=[path])
    assert len(pairs(found)) == 200
    assert found.dropped == {"rest of a parquet row group that is damaged": 100}
    assert not any("quern" in query for query, _ in pairs(found))


def test_bytes_of_numbers_are_left_alone(run, tmp_path):
    vectors = [np.arange(4, dtype=np.float32).tobytes()] * 2
    write(tmp_path / "in/a.parquet", query=QUERIES, target=TARGETS, vector=vectors)
    assert pairs(run("hf", data=tmp_path / "in")) == list(zip(QUERIES, TARGETS, strict=True))


def test_what_a_file_says_counts_before_the_name_of_its_folder(run, tmp_path):
    write(tmp_path / "in/query=v2/part-0.parquet", query=["a"], target=["A"])
    assert pairs(run("hf", data=tmp_path / "in")) == [("a", "A")]
