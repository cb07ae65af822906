"""Tables and JSON as other programs leave them: packed under any name, with row names, headers again, empty parts."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from data_prep.errors import UserError
from data_prep.sources.dialects import Said
from data_prep.sources.json_lists import list_pieces, read_list
from data_prep.sources.records import Dropped
from data_prep.sources.tables import open_table, read_table

PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda raw: pyarrow.compress(raw, codec="zstd", asbytes=True),
}
LINES = "".join(json.dumps({"query": f"q{number}", "target": "t"}) + "\n" for number in range(4000)).encode()


def read(tmp_path, raw: bytes, name: str = "t.csv", said: Said | None = None):
    (tmp_path / name).write_bytes(raw)
    rows = [row for piece in open_table(tmp_path / name, said or Said()).pieces(3) for row in read_table(piece)]
    return [row[1] for row in rows if not isinstance(row, Dropped)], [row for row in rows if isinstance(row, Dropped)]


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.{}", "t.jsonl.gz"])
def test_a_file_is_unpacked_by_its_bytes_whatever_its_name(run, tmp_path, ending, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name.format(ending)).write_bytes(PACKERS[ending](LINES[:2000]) + PACKERS[ending](LINES[2000:]))
    assert run("texts", files=(str(tmp_path / "in"),)).receipt["went_out"] == {"text-pairs": 4000}


@pytest.mark.parametrize("ending", PACKERS)
def test_of_a_packed_file_that_is_cut_short_what_came_before_stays(run, tmp_path, ending):
    path = tmp_path / f"t.jsonl.{ending}"
    path.write_bytes(PACKERS[ending](LINES) + PACKERS[ending](LINES)[:-99])
    found = run("texts", files=(str(path),))
    assert found.dropped["rest of a packed file that is cut short or damaged"] == 1
    assert found.receipt["went_out"]["text-pairs"] > 3800


def test_a_name_that_says_packed_for_a_plain_file_is_no_fault(tmp_path):
    assert read(tmp_path, b"query,target\na,b\n", "t.csv.gz")[0] == [{"query": "a", "target": "b"}]


@pytest.mark.parametrize(
    ("head", "what"), [(b"PK\3\4", "zip"), (b"\xd0\xcf\x11\xe0", "Excel"), (b"PAR1", "parquet"), (b"%PDF-", "PDF")]
)
def test_what_is_no_text_is_refused_by_its_name(run, tmp_path, head, what):
    for name in ("t.csv", "t.jsonl", "t.xlsx"):
        (tmp_path / name).write_bytes(head + b"\0query,target\n" * 9)
        with pytest.raises(UserError, match=what):
            run("texts", files=(str(tmp_path / name),))


def test_row_numbers_of_r_and_delimiters_at_the_ends_have_no_name(tmp_path):
    expected = [{"query": "a", "target": "b"}, {"query": "c", "target": "d"}]
    for raw in (b'"query","target"\n"1","a","b"\n"2","c","d"\n', b"query,target\n7,a,b\n8,c,d\n",
                b"query,target\na,b,\nc,d,\n"):  # fmt: skip
        rows, dropped = read(tmp_path, raw)
        assert [{name: row[name] for name in ("query", "target")} for row in rows] == expected
        assert not dropped
    for raw in (b"query,target\none, two,b\nc,d\n", b"query,target\n1,000 men,x\n1,000 women,y\n"):  # no quotes
        assert {one.reason for one in read(tmp_path, raw)[1]} == {"more values than columns"}


def test_the_header_of_a_file_that_was_put_behind_is_no_row(tmp_path):
    raw = b"\xef\xbb\xbfquery,target\na,b\n"
    rows, dropped = read(tmp_path, raw + raw + b"query,other\n")
    assert rows == [{"query": "a", "target": "b"}] * 2 + [{"query": "query", "target": "other"}]
    assert [(one.reason, one.where) for one in dropped] == [("the table's first line again", "t.csv, line 3")]
    rows, _ = read(tmp_path, b"q,a\nq,a\n", said=Said(header=False))
    assert len(rows) == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"query,target\r\r\na,b\r\r\nc,d\r\r\n",
        b"query,target\ra,b\rc,d\n",
        b"\n\r\nquery,target\na,b\nc,d\n",
        b'\nsep=;\nquery;target\n"a";b\nc;d\n',
    ],
)
def test_line_ends_and_empty_lines_of_any_kind_are_no_text(tmp_path, raw):
    assert read(tmp_path, raw) == ([{"query": "a", "target": "b"}, {"query": "c", "target": "d"}], [])


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"query,target\n'a, b','c'\n'it''s','x'\n'y','z'\n", "single quotes"),
        (b'query,target\n"a", "b"\n"c, d", "e"\n', "quotes behind a space"),
        ("query,target\n駅,b\n".encode("iso2022_jp"), "say --encoding iso2022_jp"),
        (b'query,target\n"5" disk",b\nc,"d"\n"e","f"\n', "say --quoting double or --quoting none"),
    ],
)
def test_quotes_and_alphabets_of_other_kinds_are_asked_about(tmp_path, raw, what):
    with pytest.raises(UserError, match=what):
        read(tmp_path, raw)
    said = Said(quoting="none", encoding="utf-8")
    assert [value for row in read(tmp_path, raw, said=said)[0] for value in row.values()]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("cp874", "สถานีอยู่ที่ไหน"), ("koi8_u", "Де вокзал"), ("cp1257", "kur ir šķūnis"), ("euc_jp", "駅はどこ")],
)
def test_encodings_of_all_thirty_languages_are_offered(tmp_path, encoding, text):
    with pytest.raises(UserError, match=f"{encoding} '{text[:4]}"):
        read(tmp_path, f"query,target\n{text},b\n{text},c\n".encode(encoding))


def test_parts_without_a_byte_do_not_stop_the_others(run, tmp_path):
    folder = tmp_path / "spark"
    folder.mkdir()
    for name, raw in {
        "_SUCCESS": b"",
        "part-0.csv": b"query,target\na,b\n",
        "part-1.csv": b"",
        "p.parquet": b"",
    }.items():
        (folder / name).write_bytes(raw)
    found = run("texts", files=(str(folder),))
    assert (found.dropped, found.receipt["went_out"]) == ({"file without rows": 2}, {"text-pairs": 1})
    with pytest.raises(UserError, match="is empty"):
        run("texts", files=(str(folder / "part-1.csv"),))


def test_every_value_of_a_json_list_is_counted(tmp_path):
    (tmp_path / "t.json").write_text('[1, {"a": 1}, "x, y", [2], null, {"b": "\\u00e9"}, 3]')
    for count in (1, 2, 9):
        found = [row for piece in list_pieces(tmp_path / "t.json", count) for row in read_list(piece)]
        assert [row[1] for row in found] == [1, {"a": 1}, "x, y", [2], None, {"b": "é"}, 3]


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b'{\n "query": "a",\n "target": "b"\n}\n', "go on in the next line"),
        (b'{"data": [{"query": "a", "target": "b"},\n{"query": "c", "target": "d"}]}\n', "go on in the next line"),
        (b'{"query": "a", "target": "b"},\n{"query": "c", "target": "d"},\n', "parted by commas"),
        ('{"query": "a", "target": "b"}\n'.encode("utf-16-le"), "UTF-16"),
    ],
)
def test_json_that_is_no_lines_is_refused_with_what_makes_it_so(run, tmp_path, raw, what):
    (tmp_path / "t.jsonl").write_bytes(raw)
    with pytest.raises(UserError, match=what):
        run("texts", files=(str(tmp_path / "t.jsonl"),))


def test_a_first_line_that_is_cut_costs_itself(run, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"query": "cut,\n{"query": "a", "target": "b"}\n')
    assert run("texts", files=(str(tmp_path / "t.jsonl"),)).dropped == {"not JSON": 1}


def test_names_of_columns_are_known_in_capitals(run, tmp_path):
    (tmp_path / "t.csv").write_text("Sentence1,Sentence2,Label\na,b,1\nc,d,0\n")
    assert run("texts", files=(str(tmp_path / "t.csv"),)).receipt["went_out"] == {"text-pairs": 1}


def test_a_comma_without_quotes_is_no_row_name_where_the_first_column_is_an_id(tmp_path):
    rows, dropped = read(tmp_path, b"id,query,target\n" + b"".join(b"%d,Hello, world,Hallo\n" % n for n in range(1, 9)))
    assert rows == []
    assert len(dropped) == 8


def test_classes_beside_a_positive_are_asked_about(run, tmp_path):
    """Class 0 says nothing of the pair; a label of 0 and 1 does."""
    path = tmp_path / "t.jsonl"
    rows = [{"anchor": f"a{number}", "positive": f"p{number}", "label": number % 4} for number in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"label is 2, in other rows 0.*--label-column none"):
        run("texts", files=(str(path),))
    found = run("texts", files=(str(path),), label_column="none", out=tmp_path / "all")
    assert found.receipt["went_out"] == {"text-pairs": 8}
