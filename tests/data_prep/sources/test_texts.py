"""Text pairs and triplets: each public form, and lines that are none of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_prep.errors import UserError
from pyarrow import Table, csv, parquet

NEGATIVES = [f"n{number}" for number in range(9)]


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    def write(*lines: object, name: str = "t.jsonl") -> Path:
        path = tmp_path / name
        raw = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return write


def texts(alternatives: list[dict]) -> list[str]:
    return [text["text"] for text in alternatives]


@pytest.mark.parametrize(
    ("line", "query", "target"),
    [
        (["q", "t"], ["q"], ["t"]),
        ({"set": ["a", "b", "c"]}, ["a"], ["b", "c"]),
        ({"query": "q", "pos": ["p1", "p2"]}, ["q"], ["p1", "p2"]),
        ({"query": "q", "pos": "p"}, ["q"], ["p"]),
    ],
)
def test_each_form_of_pair(write, run, line, query, target):
    (sample,) = run("texts", files=[write(line)], language="en").samples["text-pairs"]
    assert (texts(sample.content["query"]), texts(sample.content["target"])) == (query, target)
    assert "negatives" not in sample.content
    assert sample.row.languages == ("en",)


@pytest.mark.parametrize("line", [["q", "p", *NEGATIVES], {"query": "q", "pos": ["p"], "neg": NEGATIVES}])
def test_enough_negatives_make_a_triplet_of_seven(write, run, line):
    (sample,) = run("texts", files=[write(line)]).samples["text-triplets"]
    assert [texts(negative) for negative in sample.content["negatives"]] == [[n] for n in NEGATIVES[:7]]


def test_fewer_negatives_make_a_pair_and_are_counted(write, run):
    found = run("texts", files=[write(["q", "p", "n"], {"query": "q2", "pos": ["p2"], "neg": ["n"] * 7})])
    assert found.receipt["went_out"] == {"text-pairs": 1, "text-triplets": 1}
    assert found.receipt["notes"] == {"with fewer than 7 negatives, as pairs": 1}


def test_two_languages_and_an_origin_are_recorded(write, run):
    path = write(["hallo", "hello"])
    (sample,) = run("texts", files=[path], language="de,en", origin="machine-translation").samples["text-pairs"]
    assert [text["language"] for text in (*sample.content["query"], *sample.content["target"])] == ["de", "en"]
    assert sample.content["query"][0]["origin"] == "machine-translation"
    assert sample.row.languages == ("de", "en")


def test_packed_plain_and_folder_give_the_same_samples(write, run, tmp_path):
    lines = [[f"q{number}", f"t{number}"] for number in range(50)]
    found = [
        run("texts", files=[write(*lines, name=name)], out=tmp_path / f"out-{name}")
        for name in ("a.jsonl", "a.jsonl.gz")
    ]
    assert [s.content["query"] for s in found[0].samples["text-pairs"]] == [
        s.content["query"] for s in found[1].samples["text-pairs"]
    ]
    both = run("texts", files=[tmp_path], out=tmp_path / "out-both")
    assert both.receipt["went_out"] == {"text-pairs": 100}


def test_items_differ_between_all_lines_of_all_pieces(write, run, monkeypatch):
    import data_prep.sources.tables as module

    monkeypatch.setattr(module, "_LINES", 100)
    found = run("texts", files=[write(*([f"q{number}", f"t{number}"] for number in range(100)))])
    samples = found.samples["text-pairs"]
    assert found.receipt["job"]["units"] > 10
    assert [texts(sample.content["query"]) for sample in samples] == [[f"q{number}"] for number in range(100)]
    assert len({sample.content["item"] for sample in samples}) == 100


def test_lines_of_no_form_are_counted_by_reason(write, run):
    bad = [
        "{cut",
        '"text"',
        ["one"],
        {"query": "q"},
        {"set": ["one"]},
        [1, 2],
        {"query": "q", "pos": [None]},
        ["", "t"],
    ]
    path = write(["q", "t"], *bad, "", ["\ud800 lone", "t"])
    path.write_bytes(path.read_bytes() + b'["latin \xe9", "t"]\n')
    found = run("texts", files=[path])
    assert found.receipt["went_out"] == {"text-pairs": 1}
    assert found.dropped == {
        "text with half a character (a lone surrogate)": 1,
        "empty text": 2,
        "not JSON": 1,
        "not UTF-8": 1,
        "not one of the forms of pairs and triplets": 5,
    }


def test_a_line_without_an_end_is_passed_over_and_not_kept(write, run, monkeypatch):
    import data_prep.sources.tables as module

    monkeypatch.setattr(module, "_FIELD", 100)
    monkeypatch.setattr(module, "_LINES", 150)
    found = run("texts", files=[write(["q", "t"], ["long " * 200, "t"], ["q2", "t2"], ["x" * 500, "y" * 9])])
    assert [texts(sample.content["query"]) for sample in found.samples["text-pairs"]] == [["q"], ["q2"]]
    assert found.dropped == {"line too long": 2}


def test_nothing_usable_and_nothing_there_are_errors(write, run, tmp_path):
    with pytest.raises(UserError, match="1 came in and nothing went out \\(not JSON: 1, first t.jsonl, line 1\\)"):
        run("texts", files=[write("{cut")])
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        run("texts", files=[tmp_path / "nowhere"])
    for languages in ("de,en,fr", "de,", ""):
        with pytest.raises(UserError, match="expected one language, or QUERY,TARGET"):
            run("texts", files=[write(["q", "t"])], language=languages)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="holds no .jsonl"):
        run("texts", files=[tmp_path / "bare"])


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    """A table as a file of the kind that its name says."""

    def save(columns: dict[str, list], name: str) -> Path:
        path, table = tmp_path / name, Table.from_pydict(columns)
        if name.endswith(".parquet"):
            parquet.write_table(table, path, row_group_size=2)
        else:
            csv.write_csv(table, path, csv.WriteOptions(delimiter="\t" if ".tsv" in name else ","))
            if name.endswith(".gz"):
                path.write_bytes(gzip.compress(path.read_bytes()))
        return path

    return save


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.tsv.gz", "t.parquet"])
def test_a_table_gives_what_json_lines_give(write, save, run, tmp_path, name):
    """Quotes, commas and line ends in texts; negatives in columns of their own, one row with too few."""
    rows = [(f"q{number}", f'a "{number}", and\nmore', *(f"n{number}.{k}" for k in range(7))) for number in range(5)]
    rows[3] = (*rows[3][:-1], "")
    names = ["anchor", "positive", *(f"negative_{k}" for k in range(1, 8))]
    table = save(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), name)
    found = run("texts", files=[table], out=tmp_path / "table")
    lines = run("texts", files=[write(*map(list, rows))], out=tmp_path / "lines")
    assert found.receipt["went_out"] == {"text-pairs": 1, "text-triplets": 4}
    assert found.receipt["notes"]["with fewer than 7 negatives, as pairs"] == 1
    for kind, samples in lines.samples.items():
        assert [{**s.content, "item": ""} for s in found.samples[kind]] == [{**s.content, "item": ""} for s in samples]


def test_negatives_may_be_a_list_in_one_column_and_columns_may_be_named(save, run):
    columns = {
        "id": [1, 2],
        "ask": ["a", "b"],
        "reply": ["c", "d"],
        "wrong": [NEGATIVES, NEGATIVES[:2]],
        "query": ["", ""],
    }
    path = save(columns, "t.parquet")
    named = {"query_column": "ask", "target_column": "reply", "negative_columns": "wrong"}
    found = run("texts", files=[path], **named)
    (triplet,), (pair,) = found.samples["text-triplets"], found.samples["text-pairs"]
    assert (texts(triplet.content["query"]), texts(triplet.content["target"])) == (["a"], ["c"])
    assert [texts(negative) for negative in triplet.content["negatives"]] == [[n] for n in NEGATIVES[:7]]
    assert (texts(pair.content["query"]), texts(pair.content["target"])) == (["b"], ["d"])


def test_rows_without_a_text_are_counted(save, write, run):
    parquets = save({"query": ["q", None, "", "q"], "answer": ["a", "a", "a", None]}, "t.parquet")
    found = run("texts", files=[parquets, write("query,answer", "q,a", "alone", "q,", name="t.csv")])
    assert found.receipt["went_out"] == {"text-pairs": 2}
    assert found.dropped == {"empty text": 2, "not one of the forms of pairs and triplets": 3}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": ["x"], "answer": ["y"]}, {}, "none of a, answer is known for the query; name it: --query-column"),
        ({"query": ["x"], "b": ["y"]}, {}, "none of query, b is known for the target; name it: --target-column"),
        ({"query": ["x"], "b": ["y"]}, {"target_column": "c"}, "has no column c; it has query, b"),
        ({"query": ["x"], "pos": ["y"]}, {"negative_columns": "n1,n2"}, "has no column n1, n2; it has query, pos"),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_columns_that_are_not_there_are_named(save, run, name, columns, options, message):
    with pytest.raises(UserError, match=message):
        run("texts", files=[save(columns, name)], **options)


def test_one_json_list_is_read_as_its_rows_and_json_lines_in_utf_16_are_refused_by_name(run, tmp_path):
    rows = [{"query": "a", "target": "b"}, ["c", "d"], {"query": 5}]
    (tmp_path / "l.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "pairs.json").write_text(json.dumps([["a", "b"], ["c", "d"]]))
    found = run("texts", files=[tmp_path / "l.json", tmp_path / "pairs.json"])
    texts = [(one.content["query"][0]["text"], one.content["target"][0]["text"]) for one in found.samples["text-pairs"]]
    assert texts == [("a", "b"), ("c", "d")] * 2
    assert found.receipt["examples"] == {"not one of the forms of pairs and triplets": ["l.json, element 2"]}
    for encoding in ("utf-16", "utf-32"):
        (tmp_path / "w.jsonl").write_text('["a", "b"]\n', encoding=encoding)
        with pytest.raises(UserError, match=r"w\.jsonl: is UTF-16 or UTF-32; JSON lines are UTF-8"):
            run("texts", files=[tmp_path / "w.jsonl"], out=tmp_path / "wide")
