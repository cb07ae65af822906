"""Sets that come as parquet: ViDoRe for training and in BEIR's form, ArXivCap."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from data_prep.errors import UserError
from data_prep.sources.captions import ArxivCap
from data_prep.sources.parquet import parquet_pieces, read_parquet
from data_prep.sources.records import Dropped
from pyarrow import parquet


def write(path: Path, rows: list[dict], group: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def vidore_row(image: bytes | None, **fields: object) -> dict:
    return {
        "image": None if image is None else {"bytes": image, "path": None},
        "image_filename": "images/1810_1.jpg",
        "query": "What is shown?",
        "answer": "A curve",
        "source": "arxiv_qa",
        "options": None,
        "page": "",
        "model": "gpt4V",
        "prompt": "",
        **fields,
    }


def test_vidore_training_rows_are_queries_with_answers(tmp_path, run, picture):
    rows = [
        vidore_row(picture(0), answer="B", options="['A. red', 'B. blue']"),
        vidore_row(picture(1), answer="['ITC limited']", model=None, page="3", source="docvqa"),
        vidore_row(picture(2), answer="", model="claude", source="pdf"),
        vidore_row(None),
        vidore_row(picture(3), query=None),
        vidore_row(b"broken"),
    ]
    found = run("vidore", files=[write(tmp_path / "data/train-00000-of-00001.parquet", rows, group=2)])
    samples = found.samples["image-long"]
    assert [sample.captions for sample in samples] == [
        ["What is shown? blue"],
        ["What is shown? ITC limited"],
        ["What is shown?"],
    ]
    assert [sample.content["captions"][0]["origin"] for sample in samples] == [
        "synthetic:gpt4V",
        "human:joined",
        "synthetic:claude",
    ]
    assert samples[1].content["item"] == "vidore/images/1810_1.jpg/3"
    assert found.dropped == {"no image": 1, "no question": 1, "not an image": 1}


@pytest.mark.parametrize("layout", ["folders", "files"])
def test_vidore_in_beirs_form_keeps_every_page_and_each_pages_queries(tmp_path, run, picture, layout):
    root = tmp_path / "bench"
    name = (
        (lambda part: f"{part}/test-00000.parquet") if layout == "folders" else (lambda part: f"data/{part}-0.parquet")
    )
    write(root / name("corpus"), [{"corpus-id": n, "image": {"bytes": picture(n), "path": ""}} for n in range(4)])
    write(root / name("queries"), [{"query-id": 10, "query": "first"}, {"query-id": 11, "query": "second"}])
    write(
        root / name("qrels"),
        [
            {"query-id": 10, "corpus-id": 1, "score": 1},
            {"query-id": 11, "corpus-id": 1, "score": 2},
            {"query-id": 11, "corpus-id": 3, "score": 1},
            {"query-id": 10, "corpus-id": 2, "score": 0},
        ],
    )
    samples = run("vidore", evalset=True, folder=root).samples["image-short"]
    assert [sample.captions for sample in samples] == [["0"], ["first", "second"], ["2"], ["second"]]
    assert [sample.content["captions"][0]["role"] for sample in samples] == ["key", "query", "key", "query"]


def test_a_benchmark_without_one_of_its_parts_is_refused(tmp_path, run, picture):
    write(tmp_path / "corpus.parquet", [{"corpus-id": 1, "image": picture()}])
    with pytest.raises(UserError, match=r"holds no qrels\*.parquet and no folder qrels/"):
        run("vidore", evalset=True, folder=tmp_path)


def test_arxivcap_joins_the_captions_of_figure_and_part(tmp_path, run, picture):
    def part(image: bytes | None, text: str | None) -> dict:
        return {"sub_caption": text, "image": None if image is None else {"bytes": image, "path": "p"}}

    paper = {
        "src": "arXiv_src_1",
        "title": "t",
        "caption_images": [
            {"caption": "Figure 1: two curves", "cil_pairs": [part(picture(0), "(a) left"), part(picture(1), "")]},
            {"caption": "", "cil_pairs": [part(picture(2), None), part(None, "x")]},
        ],
    }
    found = run("arxivcap", files=[write(tmp_path / "arXiv.parquet", [paper, {**paper, "caption_images": None}])])
    samples = found.samples["image-short"]
    assert [sample.captions for sample in samples] == [["Figure 1: two curves (a) left"], ["Figure 1: two curves"]]
    assert len({sample.content["item"] for sample in samples}) == 2
    assert found.dropped == {"no caption": 1, "no image": 1}


@pytest.mark.parametrize(
    ("figures", "dropped"),
    [
        ("figures", {"no list of figures": 1}),
        ({"caption": "c"}, {"no list of figures": 1}),
        ([1, 2], {"figure without parts": 2}),
        ([{"caption": "c", "cil_pairs": "parts"}, None], {"figure without parts": 2}),
        ([{"caption": "c", "cil_pairs": ["part"]}], {"no image": 1}),
    ],
)
def test_figures_of_another_type_are_counted(tmp_path, figures, dropped):
    source = ArxivCap((str(write(tmp_path / "a.parquet", [{"caption_images": figures}])),))
    found = [one for piece in source.pieces() for one in source.read(piece)]
    assert Counter(one.reason for one in found) == dropped


def benchmark(root: Path, picture, names: tuple[str, str], corpus: list, queries: list, qrels: list) -> Path:
    """A benchmark of three pages and queries with these ids; qrels: (query, page) of these ids."""
    page, query = names
    write(root / "corpus.parquet", [{page: own, "image": {"bytes": picture(n)}} for n, own in enumerate(corpus)])
    write(root / "queries.parquet", [{query: own, "query": f"question {own}"} for own in queries])
    write(root / "qrels.parquet", [{query: one, page: other, "score": 2} for one, other in qrels])
    return root


@pytest.mark.parametrize("names", [("corpus-id", "query-id"), ("corpus_id", "query_id")])
@pytest.mark.parametrize("other", [int, float, str, lambda number: f"{number}.0", lambda number: b"%d" % number])
def test_ids_are_the_same_whatever_type_a_part_gives_them(tmp_path, run, picture, names, other):
    qrels = [(other(n), other(n)) for n in (1, 2, 3)]
    root = benchmark(tmp_path / "b", picture, names, [1, 2, 3], [1, 2, 3], qrels)
    found = run("vidore", evalset=True, folder=root)
    assert [(sample.content["item"], sample.captions) for sample in found.samples["image-short"]] == [
        (f"vidore/{n}", [f"question {n}"]) for n in (1, 2, 3)
    ]
    assert found.dropped == {}


def test_a_join_that_finds_nothing_is_refused_and_one_that_loses_some_says_so(tmp_path, run, picture):
    names = ("corpus-id", "query-id")
    apart = benchmark(tmp_path / "a", picture, names, [1, 2, 3], [1, 2, 3], [(1, 101), (2, 102)])
    with pytest.raises(
        UserError, match="no query asks for any page: judgements are of 101, 102, the corpus has 1, 2, 3"
    ):
        run("vidore", evalset=True, folder=apart)
    qrels = [(1, 1), (2, 7), (9, 3), (9, 8)]
    found = run("vidore", evalset=True, folder=benchmark(tmp_path / "b", picture, names, [1, 2, 3], [1, 2], qrels))
    assert [sample.captions for sample in found.samples["image-short"]] == [["question 1"], ["2"], ["3"]]
    assert found.dropped == {"judgements of relevance whose query or page is not there": 3}


def test_two_benchmarks_in_one_folder_are_not_mixed_up(tmp_path, run, picture):
    for name in "ab":
        benchmark(tmp_path / "both" / name, picture, ("corpus-id", "query-id"), [1], [1], [(1, 1)])
    with pytest.raises(UserError, match="two pages have the id '1'; if the folder holds several benchmarks, name one"):
        run("vidore", evalset=True, folder=tmp_path / "both")


def test_images_of_files_that_share_a_name_are_different_items(tmp_path, run, picture):
    for number, name in enumerate("ab"):
        write(tmp_path / name / "0.parquet", [vidore_row(picture(number), image_filename=None)])
    samples = run("vidore", files=[tmp_path]).samples["image-long"]
    assert [sample.content["item"] for sample in samples] == [
        "vidore/a/0.parquet, row 1", "vidore/b/0.parquet, row 1"
    ]  # fmt: skip


@pytest.mark.parametrize("score", ["1", None, True, float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(tmp_path, run, picture, score):
    write(tmp_path / "corpus.parquet", [{"corpus-id": 1, "image": {"bytes": picture(0), "path": None}}])
    write(tmp_path / "queries.parquet", [{"query-id": 1, "query": "q"}])
    write(tmp_path / "qrels.parquet", [{"query-id": 1, "corpus-id": 1, "score": score}])
    with pytest.raises(UserError, match="expected numbers"):
        run("vidore", evalset=True, folder=tmp_path)


def test_row_groups_become_pieces_and_a_damaged_one_is_counted(tmp_path, run, picture):
    rows = [vidore_row(picture(n), image_filename=str(n)) for n in range(1200)]
    path = write(tmp_path / "v.parquet", rows, group=300)
    data = bytearray(path.read_bytes())
    place = parquet.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    data[place : place + 4000] = b"\xff" * 4000
    path.write_bytes(data)
    found = run("vidore", files=[path])
    assert found.receipt["job"]["units"] == 2
    assert 600 <= found.receipt["went_out"]["image-long"] < 1200
    assert found.receipt["came_in"] == 1200  # what the damage took is counted in rows
    assert found.dropped["rest of a parquet row group that is damaged"] <= 300


def test_a_file_that_is_no_parquet_or_lacks_columns_is_refused(tmp_path, run):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a parquet file that can be read"):
        run("vidore", files=[tmp_path / "x.parquet"])
    with pytest.raises(UserError, match="has no column image; it has query"):
        run("vidore", files=[write(tmp_path / "y.parquet", [{"query": "x"}])])


def unchecked(texts: list[bytes]) -> pyarrow.Array:
    """Texts that are not UTF-8 in a column of strings, as writers leave them that do not check."""
    return pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())


@pytest.mark.parametrize("group", [10, 1000])
def test_a_value_that_cannot_be_read_costs_its_row_whatever_the_row_group(tmp_path, run, group):
    queries = [b"caf\xe9" if number in (13, 57) else f"query {number}".encode() for number in range(60)]
    days = pyarrow.array([10**9 if number == 31 else number for number in range(60)], pyarrow.int32()).view("date32")
    table = {"query": unchecked(queries), "answer": [f"answer {number}" for number in range(60)], "negative": days}
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet", row_group_size=group)
    found = run("texts", files=[tmp_path / "t.parquet"], negative_columns="answer")
    assert found.receipt["went_out"] == {"text-pairs": 58}
    assert found.dropped == {"not UTF-8": 2}
    assert found.receipt["examples"] == {"not UTF-8": ["t.parquet, row 14", "t.parquet, row 58"]}
    rows = [row for piece in parquet_pieces([tmp_path / "t.parquet"], 1000, columns=()) for row in
            read_parquet(piece, ("negative",))]  # fmt: skip
    assert rows[31] == ("t.parquet, row 32", {"negative": None})  # a date that Python does not have, and no text
    assert len(rows) == 60


def test_damage_in_a_row_group_is_counted_in_rows_and_costs_no_other_group(tmp_path):
    table = pyarrow.table({"query": [f"query number {number}" for number in range(400)]})
    path = tmp_path / "t.parquet"
    parquet.write_table(table, path, row_group_size=100, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    place = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[place : place + 400] = b"\xff" * 400
    path.write_bytes(data)
    (piece,) = parquet_pieces([path], 1000, columns=())
    found = list(read_parquet(piece, ("query",)))
    lost = [row for row in found if isinstance(row, Dropped)]
    assert [row.reason for row in lost] == ["rest of a parquet row group that is damaged"]
    assert len(found) - 1 + lost[0].count == 400
    assert [row[0] for row in found if not isinstance(row, Dropped)][-200:] == [
        f"t.parquet, row {number}" for number in range(201, 401)
    ]


PEAK = r"""
import re, sys
from pathlib import Path
from data_prep.sources.parquet import parquet_pieces, read_parquet
read = sum(len(row[1]["image"]["bytes"]) for piece in parquet_pieces([Path(sys.argv[1])], 10**9, columns=["image"])
           for row in read_parquet(piece, ["image"]))
print(read >> 20, int(re.search("VmHWM:\\s*([0-9]+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process alone is in /proc")
def test_memory_does_not_grow_with_the_row_group(tmp_path):
    """One row group and one page, as pyarrow and pandas write by default, of 96 and of 288 MiB."""
    image, peaks = os.urandom(2**20), []
    kind = pyarrow.schema([("image", pyarrow.struct([("bytes", pyarrow.binary())]))])
    for megabytes in (96, 288):
        path = tmp_path / f"{megabytes}.parquet"
        table = pyarrow.table({"image": [{"bytes": image}] * megabytes}, schema=kind)
        parquet.write_table(table, path, compression="none", use_dictionary=False)
        del table
        assert parquet.read_metadata(path).num_row_groups == 1
        command = [sys.executable, "-c", PEAK, str(path)]
        read, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        assert read == megabytes
        path.unlink()
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 48, peaks


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.binary(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.binary()),
    ],
    ids=str,
)
def test_texts_are_read_whatever_their_type_and_bytes_that_are_none_cost_a_row(tmp_path, run, kind):
    wrong = pyarrow.types.is_binary(kind)
    query = [b"Caf\xe9" if wrong else "fine", "日本語".encode() if wrong else "日本語", None]
    values = pyarrow.array([one.decode() if isinstance(one, bytes) and not wrong else one for one in query])
    column = values.dictionary_encode() if pyarrow.types.is_dictionary(kind) else values
    many = pyarrow.array([["a", "b"], ["c"], ["d"]], pyarrow.list_(pyarrow.string()))
    table = pyarrow.table({"a.query": column.cast(kind), "a.target": many, "a": [{"query": "another"}] * 3})
    parquet.write_table(table, tmp_path / "x.parquet")
    found = run("texts", files=[tmp_path / "x.parquet"], query_column="a.query", target_column="a.target")
    pairs = [
        (sample.content["query"][0]["text"], [text["text"] for text in sample.content["target"]])
        for sample in found.samples["text-pairs"]
    ]
    assert pairs == [("fine", ["a", "b"])] * (not wrong) + [("日本語", ["c"])]
    assert found.receipt["came_in"] == 3
    assert found.dropped.get("not UTF-8", 0) == wrong


def test_a_dotted_name_is_a_field_of_a_struct_where_no_column_is_called_so(tmp_path, run):
    rows = [{"translation": {"en": "a dog", "de": "ein Hund"}, "id": 1}, {"translation": None, "id": 2}]
    path = write(tmp_path / "x.parquet", rows)
    found = run("texts", files=[path], query_column="translation.en", target_column="translation.de", language="en,de")
    (sample,) = found.samples["text-pairs"]
    assert [sample.content[side][0]["text"] for side in ("query", "target")] == ["a dog", "ein Hund"]
    with pytest.raises(UserError, match="has no column translation.fr"):
        run("texts", files=[path], query_column="translation.en", target_column="translation.fr")


def test_a_column_that_is_there_twice_is_refused(tmp_path, run):
    table = pyarrow.table([["q"], ["t"], ["r"]], names=["query", "target", "query"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has the column 'query' twice"):
        run("texts", files=[tmp_path / "x.parquet"])


def test_ids_of_bytes_join_as_texts(tmp_path, run, picture):
    write(tmp_path / "corpus.parquet", [{"corpus-id": b"d1", "image": {"bytes": picture(0), "path": None}}])
    write(tmp_path / "queries.parquet", [{"query-id": b"q1", "query": b"first"}])
    write(tmp_path / "qrels.parquet", [{"query-id": "q1", "corpus-id": "d1", "score": 1}])
    (sample,) = run("vidore", evalset=True, folder=tmp_path).samples["image-short"]
    assert (sample.captions, sample.content["item"]) == (["first"], "vidore/d1")


def test_hidden_files_of_a_folder_are_not_read(tmp_path, run):
    write(tmp_path / "in/a.parquet", [{"query": "q", "target": "t"}])
    for name in ("._a.parquet", ".cache/x.parquet", "__MACOSX/a.parquet"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(bytes(100))
    assert run("texts", files=[tmp_path / "in"]).receipt["went_out"] == {"text-pairs": 1}
