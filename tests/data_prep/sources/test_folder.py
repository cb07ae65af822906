"""A folder of images with a table: columns by name, every bad row counted, nothing read outside the folder."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path

import pytest
from data_prep.cli import main
from data_prep.errors import UserError
from data_prep.shards import Dataset


def write_table(path: Path, rows: list[list[str]], **options: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path, picture) -> Path:
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    for number in range(6):
        (root / f"sub/{number}.jpg").write_bytes(picture(number))
    return root


def test_a_csv_beside_the_images_is_all_it_takes(folder, tmp_path, capsys):
    rows = [["file", "caption", "language"], ["sub/0.jpg", 'a, b\nand "c"', "en"], ["sub/1.jpg", "Bär", "de"]]
    write_table(folder / "captions.csv", rows)
    assert main(["import", "images", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "went out" in capsys.readouterr().out
    assert (tmp_path / "out/image-short/images/manifest.json").exists()


def test_texts_languages_and_bytes_arrive_as_they_are(folder, run, picture):
    write_table(folder / "t.csv", [["file", "caption", "language"], ["sub/3.jpg", 'a, b\nand "c"', "de"]])
    (sample,) = run("images", folder=folder).samples["image-short"]
    assert sample.image == picture(3)  # small, upright and RGB: not touched
    assert sample.content == {
        "captions": [{"text": 'a, b\nand "c"', "language": "de", "origin": "human", "role": "name"}],
        "source": "images",
        "item": "images/sub/3.jpg",
    }
    assert sample.row.languages == ("de",)


@pytest.mark.parametrize("name", ["t.tsv", "t.csv", "t.jsonl", "t.jsonl.gz", "t.csv.gz"])
def test_every_form_of_table_gives_the_same_samples(folder, run, name):
    rows = [{"image": f"sub/{number}.jpg", "text": f"bild {number}"} for number in range(6)]
    if "jsonl" in name:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        mark = "\t" if "tsv" in name else ","
        text = "\n".join([f"image{mark}text", *(f"{row['image']}{mark}{row['text']}" for row in rows)])
    raw = text.encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    samples = run("images", folder=folder, language="de").samples["image-short"]
    assert [sample.captions for sample in samples] == [[f"bild {number}"] for number in range(6)]


def test_short_and_long_columns_give_two_data_sets_and_lists_give_alternatives(folder, run):
    row = {"img": "sub/0.jpg", "short": ["one", "two"], "story": "a long story"}
    (folder / "t.jsonl").write_text(json.dumps(row))
    found = run("images", folder=folder, image_column="img", caption_column="short", long_column="story")
    assert found.samples["image-short"][0].captions == ["one", "two"]
    assert found.samples["image-long"][0].captions == ["a long story"]
    assert found.samples["image-long"][0].content["captions"][0]["role"] == "long"


def test_bad_rows_are_counted_by_reason_and_the_rest_goes_on(folder, run, snapshot, tmp_path):
    (tmp_path / "secret.jpg").write_bytes((folder / "sub/0.jpg").read_bytes())
    (folder / "broken.jpg").write_bytes((folder / "sub/0.jpg").read_bytes()[:-60])
    (folder / "text.jpg").write_bytes(b"not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    lines = [
        b"\xef\xbb\xbffile,caption",  # a byte order mark in front, as spreadsheets write it
        b"sub/0.jpg,good",
        b"../secret.jpg,outside",
        b"/etc/hostname,outside",
        b"missing.jpg,missing",
        b"sub,a folder",
        b"broken.jpg,broken",
        b"text.jpg,no image",
        b"empty.jpg,empty",
        b"sub/1.jpg,",
        b",no name",
        b"sub/1.jpg",
        b"sub/1.jpg,latin \xe9",
        b"sub/1.jpg,one,two,three",
        b"",
        "sub/2.jpg,gut – обн".encode(),
    ]
    (folder / "t.csv").write_bytes(b"\r\n".join(lines))
    before = snapshot(tmp_path)
    found = run("images", folder=folder)
    assert [sample.captions for sample in found.samples["image-short"]] == [["good"], ["gut – обн"]]
    assert found.dropped == {
        "broken image": 1,
        "empty image file": 1,
        "file name outside the folder": 2,
        "more values than columns": 1,
        "no caption": 2,
        "no file name": 1,
        "no such image file": 2,
        "not UTF-8": 1,
        "not an image": 1,
    }
    assert found.receipt["came_in"] == 2 + sum(found.dropped.values())
    assert found.receipt["examples"]["broken image"] == ["t.csv, line 7"]
    assert {name: data for name, data in snapshot(tmp_path).items() if name in before} == before


def test_rows_of_wrong_types_in_json_lines_are_counted(folder, run):
    rows = ['{"image": "sub/0.jpg", "text": "good"}', '{"image": 7, "text": "x"}', '["sub/0.jpg"]', "{broken"]
    rows += ['{"image": "sub/0.jpg", "text": {"a": 1}}', '{"text": "no image"}', '{"image": "sub/0.jpg", "text": [3]}']
    (folder / "t.jsonl").write_text("\n".join(rows))
    found = run("images", folder=folder)
    assert found.receipt["went_out"] == {"image-short": 1}
    assert found.dropped == {"caption is no text": 2, "no file name": 2, "not JSON": 1, "not a JSON object": 1}


def test_a_packed_table_that_is_cut_gives_what_came_before(folder, run):
    text = "file,caption\n" + "".join(f"sub/{n % 6}.jpg,caption {n} {'x' * 50}\n" for n in range(2000))
    (folder / "t.csv.gz").write_bytes(gzip.compress(text.encode())[:-2000])
    found = run("images", folder=folder)
    assert 0 < found.receipt["went_out"]["image-short"] < 2000
    assert found.dropped == {"rest of a packed file that is cut short or damaged": 1}


@pytest.mark.parametrize(
    ("table", "options", "complaint"),
    [
        ("a,b\n1,2\n", {}, "none of a, b is known for file names; name it: --image-column"),
        ("file,b\n1,2\n", {}, "none of file, b is known for captions; name it: --caption-column"),
        ("file,text\n1,2\n", {"caption_column": "titel"}, "has no column titel; it has file, text"),
        ("file,text\n", {}, "nothing found to work on"),
        ("", {}, "is empty"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_with_a_way_out(folder, run, table, options, complaint):
    (folder / "t.csv").write_text(table)
    with pytest.raises(UserError, match=complaint):
        run("images", folder=folder, **options)


def test_no_table_two_tables_and_no_folder_say_what_to_do(folder, run, tmp_path):
    with pytest.raises(UserError, match="expected one table of captions in it, found none; name it: --table"):
        run("images", folder=folder)
    (folder / "a.csv").write_text("file,text\n")
    (folder / "b.tsv").write_text("file\ttext\n")
    with pytest.raises(UserError, match="found a.csv, b.tsv"):
        run("images", folder=folder)
    with pytest.raises(UserError, match="no such folder"):
        run("images", folder=tmp_path / "nowhere")


def test_rows_are_cut_into_pieces_without_losing_one(folder, run, monkeypatch):
    import data_prep.sources.folder as module

    write_table(
        folder / "t.csv", [["file", "caption"], *([f"sub/{n % 6}.jpg", f"line one\nof {n}"] for n in range(40))]
    )
    whole = run("images", folder=folder, out=folder.parent / "whole")
    monkeypatch.setattr(module, "_ROWS", 7)
    pieces = run("images", folder=folder, out=folder.parent / "pieces")
    assert pieces.receipt["job"]["units"] == 6
    assert [s.captions for s in pieces.samples["image-short"]] == [s.captions for s in whole.samples["image-short"]]
    assert [s.captions for s in whole.samples["image-short"]] == [[f"line one\nof {n}"] for n in range(40)]


@pytest.mark.parametrize("here", [".", "..", "./sub/.."])
def test_a_folder_may_be_named_by_dots_and_still_nothing_outside_is_read(folder, run, monkeypatch, here, picture):
    (folder.parent / "secret.jpg").write_bytes(picture(7))
    at = folder / "sub" if here == ".." else folder
    monkeypatch.chdir(at)
    names = [
        "sub/0.jpg",
        "./sub/1.jpg",
        "../secret.jpg",
        "sub/../../secret.jpg",
        ".",
        str(folder.parent / "secret.jpg"),
    ]
    write_table(folder / "t.csv", [["file", "caption"], *([name, "x"] for name in names)])
    found = run("images", folder=here, table=folder / "t.csv")
    assert [sample.content["item"] for sample in found.samples["image-short"]] == [
        "images/sub/0.jpg",
        "images/sub/1.jpg",
    ]
    assert found.dropped == {"file name outside the folder": 4}


def test_the_folder_and_links_in_it_are_followed_but_not_a_way_back_through_them(folder, run, tmp_path, picture):
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/1.jpg").write_bytes(picture(1))
    (tmp_path / "elsewhere/secret.jpg").write_bytes(picture(2))
    (folder / "link").symlink_to(tmp_path / "elsewhere/deep")
    (tmp_path / "alias").symlink_to(folder)
    write_table(folder / "t.csv", [["file", "caption"], ["link/1.jpg", "x"], ["link/../secret.jpg", "x"]])
    found = run("images", folder=tmp_path / "alias")
    assert found.receipt["went_out"] == {"image-short": 1}
    assert found.dropped == {"no such image file": 1}


@pytest.mark.parametrize("given", ["\\t", "\t"])
def test_a_tab_can_be_typed(folder, run, given):
    (folder / "t.csv").write_text("file\tcaption\nsub/0.jpg\ta, b\n")
    assert run("images", folder=folder, delimiter=given).samples["image-short"][0].captions == ["a, b"]


@pytest.mark.parametrize("given", [";;", '"', "\n"])
def test_a_delimiter_that_is_none_is_refused_with_one_line(folder, tmp_path, capsys, given):
    (folder / "t.csv").write_text("file,caption\nsub/0.jpg,x\n")
    assert main(["import", "images", str(folder), "--out", str(tmp_path / "out"), "--delimiter", given]) == 2
    assert "expected one character" in capsys.readouterr().err


@pytest.mark.parametrize("raw", [b"\x1f\x8bfile,caption\n", gzip.compress(b"file,caption\n" * 99, mtime=0)[:14]])
def test_a_table_that_is_no_gzip_or_cut_in_its_first_line_is_refused(folder, run, raw):
    (folder / "t.csv.gz").write_bytes(raw)
    with pytest.raises(UserError, match="its first line cannot be unpacked"):
        run("images", folder=folder)


OPEN = "quote that nobody closed, or over 1000 lines of text in quotes"


@pytest.mark.parametrize("rows", [500, 2])
@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("t.csv", ["sub/2.jpg,b", 'sub/3.jpg,"c, d"']),  # the next quote closes it, and goes on
        ("t.csv", ["sub/2.jpg,b", "sub/3.jpg,c"]),  # nothing closes it
        ("t.csv", ["sub/2.jpg,b"] * 2000),  # a whole table in one text
        ("t.csv.gz", ["sub/2.jpg,b", "sub/3.jpg,c"]),
        ("t.tsv", ["sub/2.jpg\tb", 'sub/3.jpg\tc"']),  # a quote at the end of a later line closes it
        ("t.csv", []),  # it is in the last line
    ],
)
def test_a_quote_that_nobody_closes_costs_its_own_line_alone(folder, run, monkeypatch, name, after, rows):
    import data_prep.sources.folder as module

    monkeypatch.setattr(module, "_ROWS", rows)
    mark = "\t" if name == "t.tsv" else ","
    before = [f"file{mark}caption", f'sub/0.jpg{mark}"two', 'lines"', f'sub/1.jpg{mark}"open']
    raw = "\n".join([*before, *after]).encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    found = run("images", folder=folder)
    captions = [sample.captions[0] for sample in found.samples["image-short"]]
    assert captions == ["two\nlines", *(next(csv.reader([line], delimiter=mark))[1] for line in after)]
    assert found.dropped == {OPEN: 1}
    assert found.receipt["examples"] == {OPEN: [f"{name}, line 4"]}


def test_quotes_inside_of_texts_stay_and_quotes_that_may_be_either_cost_their_row(folder, run):
    (folder / "t.csv").write_text('file,caption\nsub/0.jpg,"15" wide"\nsub/1.jpg,5" wide\nsub/2.jpg,"a ""b"" c"\n')
    found = run("images", folder=folder)
    assert [sample.captions for sample in found.samples["image-short"]] == [['5" wide'], ['a "b" c']]
    assert found.dropped == {"text after a quote that closes": 1}  # it may be the text's own quote, or not


def test_names_that_are_no_utf8_are_read_and_named_in_the_receipt(tmp_path, run, picture):
    odd = tmp_path / os.fsdecode(b"fot\xf3s")
    odd.mkdir()
    (odd / "0.jpg").write_bytes(picture())
    (odd / os.fsdecode(b"tabl\xe9.csv")).write_text("file,caption\n0.jpg,x\ngone.jpg,y\n")
    found = run("images", folder=odd)
    assert found.receipt["examples"] == {"no such image file": ["tabl\\udce9.csv, line 3"]}
    assert run("images", folder=odd).receipt == found.receipt  # it is known again
    command = ["import", "images", str(odd), "--out", str(tmp_path / "tasks"), "--workers", "1"]
    assert main([*command, "--task", "1/2"]) == 0  # has nothing to do
    assert main([*command, "--task", "0/2"]) == 0  # goes on with the same unfinished job
    assert (tmp_path / "tasks/image-short/images/manifest.json").exists()


def test_an_edit_that_keeps_the_size_is_other_input(folder, run):
    path = folder / "t.csv"
    path.write_text("file,caption\nsub/0.jpg,one\n")
    run("images", folder=folder)
    path.write_text("file,caption\nsub/0.jpg,two\n")
    os.utime(path, ns=(0, 1))
    with pytest.raises(UserError, match="the input is not the same"):
        run("images", folder=folder)


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["captions.csv", "captions.CSV", "captions.tsv"])
def test_what_parts_the_columns_is_seen(folder, run, mark, name):
    captions = ["a dog; it runs", "a cat, asleep", 'a bird | "rare"']
    with (folder / name).open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=mark).writerows(
            [["Dateiname", "Beschreibung"], *([f"sub/{number}.jpg", text] for number, text in enumerate(captions))]
        )
    found = run("images", folder=folder, image_column="Dateiname", caption_column="Beschreibung")
    assert [sample.captions for sample in found.samples["image-short"]] == [[text] for text in captions]


def test_a_first_line_that_can_be_parted_in_two_ways_is_settled_by_the_rows_or_asked_about(folder, run):
    (folder / "a.csv").write_text("file;caption, in English\nsub/0.jpg;a dog\nsub/0.jpg;one, two, three\n")
    options = {"folder": folder, "table": folder / "a.csv", "caption_column": "caption, in English"}
    assert [sample.captions for sample in run("images", **options).samples["image-short"]] == [
        ["a dog"], ["one, two, three"]
    ]  # fmt: skip
    (folder / "b.csv").write_text("file;caption, in English\nsub/0.jpg;a dog, running\n")
    with pytest.raises(UserError, match=r"b.csv: its columns may be parted by ',' or ';'; say --delimiter"):
        run("images", **options | {"table": folder / "b.csv"})
    found = run("images", out=folder / "out", **options | {"table": folder / "b.csv", "delimiter": ";"})
    assert found.samples["image-short"][0].captions == ["a dog, running"]


def test_what_excel_writes_by_default_is_read_when_it_is_said(folder, run, tmp_path):
    (folder / "a.csv").write_bytes("file;caption\nsub/0.jpg;Hündchen für alle\n".encode("cp1252"))
    found = run("images", folder=folder, table=folder / "a.csv", encoding="cp1252")
    assert found.samples["image-short"][0].captions == ["Hündchen für alle"]
    (folder / "b.csv").write_bytes("datei;größe\nsub/0.jpg;x\n".encode("cp1252"))
    with pytest.raises(UserError, match="say --encoding .* cp1252 .datei;größe"):
        run("images", folder=folder, table=folder / "b.csv")
    with pytest.raises(UserError, match="--encoding klingon: no such encoding"):
        run("images", folder=folder, table=folder / "a.csv", encoding="klingon")
    for encoding in ("hex", "punycode", "undefined", "cp037"):
        with pytest.raises(UserError, match=f"--encoding {encoding}: cannot be read line by line"):
            run("images", folder=folder, table=folder / "a.csv", encoding=encoding)


def test_no_picture_is_on_both_sides_of_a_split(folder, tmp_path, picture):
    rows = []
    for number in range(60):
        (folder / f"{number}.jpg").write_bytes(picture(number % 30))  # each picture under two names
        rows += [f"{number}.jpg;picture {number}", f"{number}.jpg;the same, number {number}"]
    (folder / "a.csv").write_text("\n".join(["file;caption", *rows, "gone.jpg;nothing"]))
    command = ["import", "images", str(folder), "--table", str(folder / "a.csv"), "--name", "mine", "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "out"), "--held-out", "0.3"]) == 0
    pictures = {}
    for split in ("train", "validation"):
        directory = tmp_path / f"out/{split}/image-short/mine"
        dataset = Dataset.open(directory, verify=True)
        pictures[split] = [dataset.read(index)["jpg"] for index in range(len(dataset))]
        dropped = json.loads((directory / "receipt.json").read_text())["dropped"]
        assert dropped.get("no such image file", 0) == (split == "train")
    assert not set(pictures["train"]) & set(pictures["validation"])
    assert len(pictures["train"]) + len(pictures["validation"]) == 120
    assert 0.1 < len(pictures["validation"]) / 120 < 0.5
    for wrong in (["--held-out", "1"], ["--held-out", "-0.1"], ["--split", "train"]):
        assert main([*command, "--out", str(tmp_path / "other"), *wrong]) == 2


def test_languages_that_no_sample_may_have_are_counted_instead_of_published(tmp_path, run, picture):
    (tmp_path / "a.png").write_bytes(picture(0, encoding="PNG"))
    languages = ["de", "a/b", "e\u2028n", "\x1b[31m", "\ud800", "d\x85e"]
    lines = [json.dumps({"image": "a.png", "caption": "c", "language": language}) for language in languages]
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    found = run("images", folder=tmp_path)
    assert found.receipt["went_out"] == {"image-short": 1}
    assert found.dropped == {"language that cannot be one (empty, with a slash or control characters)": 5}
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/a.jsonl").write_text('["ein Hund", "a dog"]\n')
    with pytest.raises(UserError, match="language that cannot be one"):
        run("texts", out=tmp_path / "texts", files=[tmp_path / "pairs"], language="d/e")


@pytest.mark.parametrize("held_out", [{}, {"held_out": 1e-9, "split": "train"}])
def test_names_that_no_file_can_have_are_counted(folder, run, held_out):
    names = ["\ud800.png", "a\0b.png", "x" * 5000, "y/" * 3000, "/etc/hostname", "..", "."]
    rows = [{"file": name, "caption": "text"} for name in ["sub/0.jpg", *names]]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = str(folder / "captions.jsonl")
    receipt = run("images", folder=folder, table=table, **held_out).receipt
    assert sum(receipt["dropped"].values()) == len(names)
    assert receipt["dropped"]["file name outside the folder"] == 5


def test_a_table_that_does_not_fit_its_folder_is_said_loudly(folder, tmp_path, capsys):
    rows = [["file", "caption"], ["sub/0.jpg", "a"], *([f"other/{number}.jpg", "b"] for number in range(9))]
    write_table(folder / "t.csv", rows)
    command = ["import", "images", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "WARNING: 90% of what came in was dropped, most of it for: no such image file" in shown
    assert (tmp_path / "out/image-short/images/receipt.json").exists()
    write_table(folder / "t.csv", rows[:2])
    assert main([*command, "--name", "fits"]) == 0
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ("sub/a b.jpg", "sub\\a b.jpg"),
        ("a b.jpg", "a%20b.jpg"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg"),
        ("na\u0308ch.jpg", "n\u00e4ch.jpg"),
        ("a.JPG", "a.jpg"),
        ("a.jpg", " a.JPG "),
    ],
)
def test_a_name_that_is_spelt_otherwise_is_found_and_counted(tmp_path, run, picture, there, named):
    root = tmp_path / "photos"
    (root / there).parent.mkdir(parents=True)
    (root / there).write_bytes(picture())
    (root / "100%25.jpg").write_bytes(picture(1))
    write_table(root / "t.csv", [["file", "caption"], [named, "one"], [there, "two"], ["100%25.jpg", "as it stands"]])
    found = run("images", folder=root)
    assert len({sample.content["item"] for sample in found.samples["image-short"]}) == 2
    assert [sample.captions for sample in found.samples["image-short"]] == [["one"], ["two"], ["as it stands"]]
    assert found.receipt["notes"]["images under another spelling of their name"] == 1


def test_other_spellings_lead_to_no_other_file(tmp_path, run, picture):
    root = tmp_path / "photos"
    root.mkdir()
    for number, name in enumerate(("a.jpg", "b.jpg")):
        (root / name).write_bytes(picture(number))
    (tmp_path / "out.jpg").write_bytes(picture(3))
    rows = [["a.jpg", "one"], ["A.jpg", "x"], ["..%2Fout.jpg", "y"], ["..\\out.jpg", "z"], ["a.png", "w"]]
    write_table(root / "t.csv", [["file", "caption"], *rows])
    assert run("images", folder=root).dropped == {"no such image file": 4}
