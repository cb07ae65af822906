"""Dialects of CSV and TSV: what was written comes out letter for letter, is dropped by name, or the user is asked."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from data_prep.cli import main
from data_prep.errors import UserError
from data_prep.sources.dialects import Said
from data_prep.sources.records import Dropped
from data_prep.sources.tables import open_table, read_table
from hypothesis import example, given, settings
from hypothesis import strategies as st

Rows = list[list[str]]


def rfc(delimiter: str, quoting: int, end: str = "\r\n") -> Callable[[Rows], str]:
    def write(rows: Rows) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(rows)
        return buffer.getvalue()

    return write


def csv_escaped(rows: Rows) -> str:
    buffer = io.StringIO()
    csv.writer(
        buffer, quoting=csv.QUOTE_NONE, escapechar="\\", quotechar=None, lineterminator="\n"
    ).writerows(rows)  # fmt: skip
    return buffer.getvalue()


def tatoeba(rows: Rows) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


def spark(rows: Rows) -> str:
    def cell(text: str) -> str:
        quoted = text.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{quoted}"' if any(sign in text for sign in ',"\n\r') else text

    return "".join(",".join(map(cell, row)) + "\n" for row in rows)


def outfile(rows: Rows) -> str:
    """MySQL's SELECT … INTO OUTFILE."""
    signs = str.maketrans({"\\": "\\\\", "\t": "\\\t", "\n": "\\\n", "\0": "\\0"})
    return "".join("\t".join(text.translate(signs) for text in row) + "\n" for row in rows)


def copied(rows: Rows) -> str:
    """PostgreSQL's COPY, and mysql --batch."""
    signs = str.maketrans(
        {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\0": "\\0", "\b": "\\b", "\v": "\\v", "\f": "\\f"}
    )
    return "".join("\t".join(text.translate(signs) for text in row) + "\n" for row in rows)


# How it is written, the name's ending, signs that it cannot hold, and what a user would say of it.
DIALECTS = {
    "csv": (rfc(",", csv.QUOTE_MINIMAL), "csv", "", Said(",", "double", "none")),
    "csv, all quoted": (rfc(",", csv.QUOTE_ALL, "\n"), "csv", "", Said(",", "double", "none")),
    "semicolons": (rfc(";", csv.QUOTE_MINIMAL), "csv", "", Said(";", "double", "none")),
    "tsv, quoted": (rfc("\t", csv.QUOTE_MINIMAL, "\n"), "tsv", "\t\r", Said("\t", "double", "none")),
    "tatoeba": (tatoeba, "tsv", "\t\n\r", Said("\t", "none", "none")),
    "spark": (spark, "csv", "", Said(",", "double", "\\")),
    "csv.QUOTE_NONE": (csv_escaped, "csv", "\r", Said(",", "none", "\\")),
    "outfile": (outfile, "tsv", "\r", Said("\t", "none", "\\")),
    "copied": (copied, "tsv", "", Said("\t", "none", "\\")),
}
HEADER = ["query", "target"]


def read(raw: bytes, ending: str, said: Said, count: int = 3) -> tuple[Rows, list[Dropped]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t.{ending}"
        path.write_bytes(raw)
        table = open_table(path, said)
        found = [row for piece in table.pieces(count) for row in read_table(piece)]
    return [list(row[1].values()) for row in found if not isinstance(row, Dropped)], [
        row for row in found if isinstance(row, Dropped)
    ]


_SIGNS = st.one_of(st.sampled_from("\"\\,;\t\n\r|'aN0nt \x00é“字😀"), st.characters(exclude_categories=["Cs"]))
_TEXT = st.text(_SIGNS, min_size=1, max_size=8)


@pytest.mark.parametrize("name", DIALECTS)
@settings(deadline=None, derandomize=True)
@given(rows=st.lists(st.lists(_TEXT, min_size=2, max_size=2), min_size=1, max_size=6),
       encoding=st.sampled_from(("utf-8", "utf-8-sig", "utf-16", "utf-16-be")))  # fmt: skip
@example(rows=[['"', "\\"], ['\\"', '"a", b'], ['""', "\\\\"]], encoding="utf-8")
@example(rows=[["a\nb", '"a\r\n"b'], ["x\\", "\\N\n"]], encoding="utf-16")
def test_what_was_written_comes_out_letter_for_letter_where_the_dialect_is_said(name, rows, encoding):
    write, ending, without, said = DIALECTS[name]
    rows = [["".join(sign for sign in text if sign not in without) or "x" for text in row] for row in rows]
    if name == "spark":  # \N alone is a missing value
        rows = [["x" if text == "\\N" else text for text in row] for row in rows]
    raw = write([HEADER, *rows]).encode(encoding)
    said = Said(said.delimiter, said.quoting, said.escape, "" if encoding.startswith("utf-8") else encoding)
    assert read(raw, ending, said) == (rows, [])


NATURAL = [
    '"Come in," she said.',
    '"Yes."',
    '"To be or not to be" is a line by Shakespeare.',
    'It is 5" wide.',
    "A dog, running; a cat | asleep",
    "«Entrez», dit-elle.",
    'He said: "I don\'t know, maybe".',
    'The sign says "Open"',
    "Wo ist der Bahnhof?",
    "你好，世界",
    "One line",
    "Preis: 3,50 €",
    'She called it "art", he "noise".',
]
LINES = ["two\nlines", 'a "quoted"\nline']
BACKSLASHES = ["C:\\new\\table", "the limit \\alpha of \\sum_n", "an escaped \\n and \\t"]


@pytest.mark.parametrize("name", DIALECTS)
@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from(NATURAL + LINES + BACKSLASHES), min_size=2, max_size=2),
                min_size=12, max_size=40))  # fmt: skip
def test_where_nothing_is_said_no_text_is_changed(name, rows):
    write, ending, without, _ = DIALECTS[name]
    rows = [["".join(sign for sign in text if sign not in without) for text in row] for row in rows]
    try:
        found, dropped = read(write([HEADER, *rows]).encode(), ending, Said())
    except UserError:
        return  # the user is asked
    left = [row for row in rows if row in found]
    assert [row for row in found if row not in rows] == []
    assert len(left) + sum(one.count for one in dropped) >= len(rows)


@pytest.mark.parametrize("name", DIALECTS)
def test_the_dialect_is_found_from_the_bytes_or_asked_for(name):
    write, ending, without, said = DIALECTS[name]
    texts = [*NATURAL, *LINES, *(BACKSLASHES if name != "csv.QUOTE_NONE" else [])]
    texts = ["".join(sign for sign in text if sign not in without) for text in texts]
    rows = [[text, other] for text, other in zip(texts, reversed(texts), strict=True)]
    known = Said()
    if name == "copied":  # "\\n" may be a line end or two letters
        with pytest.raises(UserError, match="backslashes .* say --escape"):
            read(write([HEADER, *rows]).encode(), ending, known)
        known = Said(escape=said.escape)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        assert read(write([HEADER, *rows]).encode(encoding), ending, known) == (rows, []), encoding


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_one_value_of_another_encoding_costs_its_row(ending):
    lines = [f"question {number}\tanswer {number}".encode() for number in range(500)]
    lines[200] = b"caf\xe9\tanswer"
    raw = b"\n".join([b"query\ttarget", *lines]).replace(b"\t", b"," if ending == "csv" else b"\t")
    found, dropped = read(raw, ending, Said(), 100)
    assert len(found) == 499
    assert [(one.reason, one.where) for one in dropped] == [("not UTF-8", f"t.{ending}, line 202")]


def test_a_file_that_is_not_utf8_is_asked_about_with_one_of_its_lines():
    raw = "query;target\nГде вокзал?;Там\nЧто это?;Лёд\n".encode("cp1251")
    with pytest.raises(UserError, match=r"say --encoding .* cp1251 .Где вокзал"):
        read(raw, "csv", Said())
    assert read(raw, "csv", Said(encoding="cp1251"))[0] == [["Где вокзал?", "Там"], ["Что это?", "Лёд"]]
    odd = "query\ttarget\n字\t字\n".encode("utf-16-le")[:-1]  # the last line end is cut
    assert [one.reason for one in read(odd, "tsv", Said())[1]] == ["not UTF-8"]


def test_quotes_that_may_be_either_are_asked_about():
    raw = b'query,target\n"yes",b\na,5" wide\nc,d\n'
    with pytest.raises(UserError, match="say --quoting double or --quoting none"):
        read(raw, "csv", Said())
    assert read(raw, "csv", Said(quoting="none"))[0] == [['"yes"', "b"], ["a", '5" wide'], ["c", "d"]]
    assert read(raw, "csv", Said(quoting="double"))[0] == [["yes", "b"], ["a", '5" wide'], ["c", "d"]]


def test_quotes_in_the_first_row_are_no_headers_where_there_is_none():
    raw = b'"Yes."\t"Ja."\n"Come in," she said.\tKomm herein.\nNo.\t"Nein."\n'
    assert read(raw, "tsv", Said(header=False))[0] == [
        ['"Yes."', '"Ja."'], ['"Come in," she said.', "Komm herein."], ["No.", '"Nein."']
    ]  # fmt: skip
    with pytest.raises(UserError, match="say --quoting"):  # all values in quotes: a table's, or a list of quotations
        read(b'"Yes."\t"Ja."\n' * 20, "tsv", Said(header=False))
    assert read(b'"query"\t"target"\n"Yes."\t"Ja."\n', "tsv", Said())[0] == [["Yes.", "Ja."]]


def test_excels_first_line_and_line_ends_of_old_macs_are_known():
    assert read(b'sep=;\r\nquery;target\r\n"a;b";c\r\n', "csv", Said())[0] == [["a;b", "c"]]
    assert read(b'query,target\ra,"b\rc"\rd,e\r', "csv", Said())[0] == [["a", "b\rc"], ["d", "e"]]


def test_a_header_that_is_missing_is_asked_about_and_can_be_said(tmp_path, run):
    (tmp_path / "t.tsv").write_text("Good day\tGuten Tag\nYes\tJa\n")
    with pytest.raises(UserError, match="none of Good day, Guten Tag is known .* say --no-header"):
        run("texts", files=[tmp_path / "t.tsv"])
    found = run("texts", files=[tmp_path / "t.tsv"], no_header=True)
    assert [sample.content["target"][0]["text"] for sample in found.samples["text-pairs"]] == ["Guten Tag", "Ja"]
    assert found.receipt["notes"] == {"tables read as: tab, quotes are text, utf-8, no header": 1}
    (tmp_path / "u.tsv").write_text("17\tGood day\tGuten Tag\tCC-BY\n")
    with pytest.raises(UserError, match="4 columns without names; say which: --query-column 1"):
        run("texts", files=[tmp_path / "u.tsv"], no_header=True, out=tmp_path / "u")
    named = {"query_column": "2", "target_column": "3"}
    found = run("texts", files=[tmp_path / "u.tsv"], no_header=True, out=tmp_path / "u", **named)
    assert [sample.content["query"][0]["text"] for sample in found.samples["text-pairs"]] == ["Good day"]


def test_images_may_have_a_table_without_a_header_and_captions_keep_their_spaces(tmp_path, run, picture):
    (tmp_path / "a.jpg").write_bytes(picture())
    (tmp_path / "t.csv").write_text('a.jpg," a caption "\n')
    with pytest.raises(UserError, match="none of a.jpg, a caption is known for file names.* say --no-header"):
        run("images", folder=tmp_path)
    assert run("images", folder=tmp_path, no_header=True).samples["image-short"][0].captions == [" a caption "]


def test_what_mysql_and_excel_call_txt_is_a_table(tmp_path, run):
    (tmp_path / "dump.txt").write_bytes(b"Good day\tGuten\\\nTag\nYes\t\\N\nNo\tNein\n")
    found = run("texts", files=[tmp_path / "dump.txt"], no_header=True)
    assert [sample.content["target"][0]["text"] for sample in found.samples["text-pairs"]] == ["Guten\nTag", "Nein"]
    assert found.dropped == {"empty text": 1}
    (tmp_path / "excel.txt").write_bytes('query\ttarget\r\n"a ""b"""\tc\r\n'.encode("utf-16"))
    found = run("texts", files=[tmp_path / "excel.txt"], out=tmp_path / "excel")
    assert found.samples["text-pairs"][0].content["query"][0]["text"] == 'a "b"'


def test_columns_by_the_thousand_are_read_and_a_message_stays_short(tmp_path, run):
    names = [f"column {number}" for number in range(5000)]
    row = [f"value {number}" for number in range(5000)]
    text = "\n".join(map(",".join, ([*names, "query", "target"], [*row, "q", "t"], [*row, "q2", "t2"])))
    (tmp_path / "t.csv").write_text(text)
    assert run("texts", files=[tmp_path / "t.csv"]).receipt["went_out"] == {"text-pairs": 2}
    with pytest.raises(UserError) as error:
        run("texts", files=[tmp_path / "t.csv"], query_column="no", out=tmp_path / "other")
    assert "5002 in all" in str(error.value)
    assert len(str(error.value)) < 1000


def test_of_two_columns_of_one_name_none_is_taken_by_chance(tmp_path, run):
    (tmp_path / "t.csv").write_text("query,target,target\na,b,c\n")
    with pytest.raises(UserError, match="has 2 columns called 'target'"):
        run("texts", files=[tmp_path / "t.csv"])


def test_files_that_share_a_last_name_are_told_apart_in_the_receipt(tmp_path, run):
    for folder in ("a/data", "b/data"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "t.csv").write_text("query,target\na,b\n,c\n")
    found = run("texts", files=[tmp_path])
    assert found.receipt["examples"] == {"empty text": ["a/data/t.csv, line 3", "b/data/t.csv, line 3"]}


def test_the_command_takes_the_options_and_tells_the_two_encodings_apart(tmp_path, capsys, picture):
    (tmp_path / "a.jpg").write_bytes(picture())
    (tmp_path / "t.csv").write_bytes('file;caption\na.jpg;Hündchen \\; "x"\n'.encode("cp1252"))
    command = ["import", "images", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "1"]
    said = ["--encoding", "cp1252", "--delimiter", ";", "--quoting", "none", "--escape", "\\"]
    assert main([*command, *said, "--image-encoding", "png"]) == 0
    assert "semicolon, quotes are text, \\ escapes, cp1252" in capsys.readouterr().out
    assert main([*command, "--name", "other", "--encoding", "png"]) == 2
    assert "--image-encoding png" in capsys.readouterr().err
