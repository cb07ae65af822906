"""Evaluation sets, read from their own files and by the evaluator that they are for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
import webdataset
from data_prep.cli import main
from data_prep.errors import UserError
from data_prep.sources import EVALSETS as SOURCES
from data_prep.sources.evalsets import Coco, Flickr30k
from datasets import Dataset as HubDataset
from datasets import Features, Image, Value
from pyarrow import parquet
from stage_trainer.data.remote_data import place
from stage_trainer.evaluation.documents import Pages
from stage_trainer.evaluation.held_out import find
from stage_trainer.evaluation.retrieval import Pool


@pytest.fixture
def images(tmp_path, picture) -> Path:
    (tmp_path / "images/val2014").mkdir(parents=True)
    for number in range(3):
        (tmp_path / f"images/{number:016x}.jpg").write_bytes(picture(number))
        (tmp_path / f"images/val2014/COCO_val2014_{number}.jpg").write_bytes(picture(number))
        (tmp_path / f"images/{number}.jpg").write_bytes(picture(number))
    return tmp_path / "images"


def pool(root: Path, command: list[str]) -> Pool:
    assert main(["evalset", *command, "--out", str(root), "--workers", "1"]) == 0
    (found,) = find(root).sets
    return Pool.open(found.directory)


def test_crossmodal_3600_by_the_first_caption_a_language(tmp_path, images):
    lines = [
        json.dumps(
            {
                "image/key": f"{number:016x}",
                "image/locale": "de",
                "de": {"caption": [f"erste\u2028 {number}", "zweite"], "caption/tokenized": ["x", "y"]},
                "quz": {"caption": [f"huk {number}"], "caption/tokenized": []},
            },
            ensure_ascii=False,
        )
        for number in range(3)
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = pool(tmp_path / "eval", ["xm3600", str(tmp_path / "captions.jsonl"), str(images)])
    assert found.name == "xm3600"
    assert found.texts == {
        "de": [(number, f"erste\u2028 {number}") for number in range(3)],
        "quz": [(number, f"huk {number}") for number in range(3)],
    }


def test_a_pool_for_training_lies_where_a_recipe_looks_for_it(tmp_path, images, capsys):
    """A recipe's `evaluation.pools: [image-short/flickr30k]` are below its corpus' validation."""
    (tmp_path / "f.txt").write_text("image,caption\n0.jpg,A man, a plan\n")
    command = ["evalset", "flickr30k", str(tmp_path / "f.txt"), str(images), "--out", str(tmp_path / "corpus")]
    assert main([*command, "--split", "validation", "--workers", "1"]) == 0
    recipe = SimpleNamespace(corpus=str(tmp_path / "corpus"), remote=None)
    assert place(recipe, "validation", "image-short/flickr30k") == tmp_path / "corpus/validation/image-short/flickr30k"
    (held_out,) = find(capsys.readouterr().out.split()[-1]).sets  # the line that it ends with works
    assert held_out.directory == tmp_path / "corpus/validation/image-short/flickr30k"


def test_of_crossmodal_3600_every_caption_is_kept(tmp_path, images, run):
    line = {"image/key": f"{0:016x}", "image/locale": "de", "de": {"caption": [" ", "erste", "zweite"]}}
    (tmp_path / "captions.jsonl").write_text(json.dumps(line))
    found = run("xm3600", evalset=True, captions=tmp_path / "captions.jsonl", images=images)
    captions = found.samples["image-short"][0].content["captions"]
    assert [(text["text"], text["role"]) for text in captions] == [("erste", "name"), ("zweite", "further")]


def test_xtd10_calls_japanese_jp(tmp_path, images):
    (tmp_path / "xtd").mkdir()
    names = [f"COCO_val2014_{number}.jpg" for number in range(3)]
    (tmp_path / "xtd/test_image_names.txt").write_text("\n".join(names) + "\n")
    for code in ("en", "jp"):
        lines = "".join(f"{code} {number}\n" for number in range(3))
        (tmp_path / f"xtd/test_1kcaptions_{code}.txt").write_text(lines)
    found = pool(tmp_path / "eval", ["xtd10", str(tmp_path / "xtd"), str(images)])
    assert {language: texts[2] for language, texts in found.texts.items()} == {"en": (2, "en 2"), "ja": (2, "jp 2")}


def test_xtd10_with_a_line_missing_is_refused(tmp_path, images, capsys):
    (tmp_path / "xtd").mkdir()
    (tmp_path / "xtd/test_image_names.txt").write_text("a.jpg\nb.jpg\n")
    (tmp_path / "xtd/test_1kcaptions_de.txt").write_text("eins\n")
    assert main(["evalset", "xtd10", str(tmp_path / "xtd"), str(images), "--out", str(tmp_path / "eval")]) == 2
    assert "has 1 lines, test_image_names.txt 2" in capsys.readouterr().err


def test_flickr30k_has_commas_in_captions_and_five_captions_an_image(tmp_path, images):
    lines = ["image,caption"] + [
        f"{number}.jpg,A man, a plan {sentence} ." for number in range(3) for sentence in range(5)
    ]
    (tmp_path / "flickr30k_test_karpathy.txt").write_text("\n".join(lines) + "\n")
    found = pool(tmp_path / "eval", ["flickr30k", str(tmp_path / "flickr30k_test_karpathy.txt"), str(images)])
    assert found.texts == {
        "en": [(number, f"A man, a plan {sentence} .") for number in range(3) for sentence in range(5)]
    }


def test_coco_joins_annotations_to_images(tmp_path, images):
    content = {
        "images": [{"id": 9 - number, "file_name": f"COCO_val2014_{number}.jpg"} for number in range(3)],
        "annotations": [{"id": k, "image_id": 9 - k % 3, "caption": f"caption {k} "} for k in range(6)],
    }
    (tmp_path / "coco_test_karpathy.json").write_text(json.dumps(content))
    found = pool(tmp_path / "eval", ["coco", str(tmp_path / "coco_test_karpathy.json"), str(images)])
    assert found.texts == {"en": [(number, f"caption {k}") for number in range(3) for k in (number, number + 3)]}


def test_laions_tars_give_the_set_that_its_lists_give(tmp_path, images):
    """As `webdataset` writes them; the last newline of a caption of COCO's is stored as two characters."""
    content = {
        "images": [{"id": n, "file_name": f"COCO_val2014_{n}.jpg"} for n in range(3)],
        "annotations": [
            {"image_id": n, "caption": f"caption {n}, {k}" + "\n" * (k == 2)} for n in range(3) for k in range(5)
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    (tmp_path / "test").mkdir()
    with webdataset.TarWriter(str(tmp_path / "test/0.tar")) as writer:
        for n, image in enumerate(content["images"]):
            captions = [of["caption"] for of in content["annotations"] if of["image_id"] == n]
            text = "\n".join(caption.replace("\n", "\\n") for caption in captions)
            writer.write(
                {"__key__": f"s{n:07}", "jpg": (images / "val2014" / image["file_name"]).read_bytes(), "txt": text}
            )
        writer.write({"__key__": "bare", "jpg": b"x"})
    by_list = pool(tmp_path / "lists", ["coco", str(tmp_path / "coco.json"), str(images)])
    by_tar = pool(tmp_path / "tars", ["wds", str(tmp_path / "test"), "--name", "coco"])
    assert (by_tar.texts, by_tar.images, by_tar.name) == (by_list.texts, by_list.images, "coco")


def test_what_is_missing_is_said_aloud(tmp_path, images, capsys):
    lines = ["image,caption", "0.jpg,here", "7.jpg,gone"]
    (tmp_path / "f.txt").write_text("\n".join(lines))
    assert main(["evalset", "flickr30k", str(tmp_path / "f.txt"), str(images), "--out", str(tmp_path / "eval")]) == 0
    assert "not the whole set: figures on it cannot be compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ['{"caption": "x"}', "[]", "1", '{"image/key": 1, "en": {"caption": [1]}}', "[" * 99_999]
)
def test_another_file_is_refused(tmp_path, images, run, line):
    (tmp_path / "x.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match="not the captions of this set"):
        run("xm3600", evalset=True, captions=tmp_path / "x.jsonl", images=images)


@pytest.mark.parametrize("caption", ["null", "1", "[]", "{}"])
def test_captions_of_coco_that_are_no_text_are_refused(tmp_path, images, run, caption):
    listed = '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": %s}]}'
    (tmp_path / "x.json").write_text(listed % caption)
    with pytest.raises(UserError, match="not the captions of this set"):
        run("coco", evalset=True, captions=tmp_path / "x.json", images=images)


def test_vidore_is_read_by_the_evaluator_with_pages_that_no_query_asks_for(tmp_path, picture):
    for part, rows in {
        "corpus": [{"corpus-id": n, "image": {"bytes": picture(n), "path": ""}} for n in range(3)],
        "queries": [{"query-id": n, "query": f"which page {n}"} for n in range(2)],
        "qrels": [{"query-id": n, "corpus-id": 2, "score": 1} for n in range(2)],
    }.items():
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{part}.parquet")
    found = pool(tmp_path / "eval", ["vidore", str(tmp_path), "--name", "vidore-arxiv"])
    assert (len(found.images), found.texts) == (3, {"en": [(2, "which page 0"), (2, "which page 1")]})


def test_captions_that_were_edited_make_other_pieces(tmp_path, images):
    path = tmp_path / "flickr.txt"
    path.write_text("filename,raw\n0.jpg,a caption\n")
    source = Flickr30k(str(path), str(images))
    before = list(source.pieces())
    assert list(source.pieces()) == before
    os.utime(path, ns=(1, 1))
    assert list(source.pieces()) != before


@pytest.mark.parametrize("name", [[], ["a.jpg"], 5, None, {}, True])
def test_an_image_that_is_not_called_by_a_text_is_refused(tmp_path, images, capsys, name):
    content = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "text"}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    assert main(["evalset", "coco", str(tmp_path / "coco.json"), str(images), "--out", str(tmp_path / "eval")]) == 2
    error = capsys.readouterr().err
    assert "not the captions of this set" in error
    assert error.count("\n") == 1


def test_a_single_text_is_not_taken_for_captions_of_one_letter(tmp_path, images, capsys):
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image/key": "0" * 16, "de": {"caption": "ein Text"}}))
    command = ["evalset", "xm3600", str(tmp_path / "captions.jsonl"), str(images), "--out", str(tmp_path / "eval")]
    assert main(command) == 2
    assert "'ein Text' are no list" in capsys.readouterr().err


@pytest.mark.parametrize(("own", "other"), [(7, 7.0), ("7", 7), (7.0, "7")])
def test_ids_of_images_and_captions_may_have_other_types(tmp_path, images, own, other):
    content = {
        "images": [{"id": own, "file_name": "a.jpg"}],
        "annotations": [{"image_id": other, "caption": "text"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    (photo,) = Coco(str(tmp_path / "coco.json"), str(images)).photos()
    assert [text.text for text in photo[1]] == ["text"]


def test_crossmodal_3600_as_mteb_serves_it_is_the_set_of_its_authors(tmp_path, images, picture):
    """The files are written by the library that wrote the published ones."""
    captions = {"de": [["erste", "zweite"]] * 3, "en": [["first", "second"], ["first"], []], "quz": [["huk"]] * 3}
    lines = []
    for number in range(3):
        of = {language: {"caption": texts[number]} for language, texts in captions.items()}
        lines.append(json.dumps({"image/key": f"{number:016x}", **of}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    kinds = Features({
        "image_id": Value("string"), "image_locale": Value("string"), "image": Image(),
        "captions": [Value("string")], "captions_tokenized": [Value("string")],
        "captions_tokenized_lowercase": [Value("string")],
    })  # fmt: skip
    for language, texts in captions.items():
        order = [2, 0, 1] if language == "quz" else [0, 1, 2]
        rows = [{"image_id": f"{n:016x}", "image_locale": "de", "image": {"bytes": picture(n), "path": f"{n}.jpg"},
                 "captions": texts[n], "captions_tokenized": texts[n], "captions_tokenized_lowercase": texts[n]}
                for n in order]  # fmt: skip
        (tmp_path / "data").mkdir(exist_ok=True)
        HubDataset.from_list(rows, kinds).to_parquet(tmp_path / f"data/{language}-00000-of-00001-abc.parquet")
    theirs = pool(tmp_path / "theirs", ["xm3600", str(tmp_path / "captions.jsonl"), str(images)])
    found = pool(tmp_path / "mteb", ["xm3600-parquet", str(tmp_path / "data"), "--name", "xm3600"])
    assert (found.name, found.images, found.texts) == (theirs.name, theirs.images, theirs.texts)
    assert found.texts["en"] == [(0, "first"), (1, "first")]


def test_of_crossmodal_3600_what_has_no_image_is_counted_and_twice_the_same_refused(tmp_path, run, picture):
    def write(name, numbers):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows = [{"image_id": f"{n}", "image": {"bytes": picture(n)}, "captions": [f"text {n}"]} for n in numbers]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)

    write("a/en-0.parquet", [0, 1])
    write("a/de-0.parquet", [0, 1, 2])
    found = run("xm3600-parquet", evalset=True, files=(str(tmp_path / "a"),))
    assert found.dropped == {"captions whose image is not there, or that cannot be read": 1}
    write("b/en-0.parquet", [0, 1])
    write("b/en-1.parquet", [1])
    write("c/nothing.parquet", [1])
    for folder, words in (("b", "the image '1' comes twice in en"), ("c", "expected LANGUAGE")):
        with pytest.raises(UserError, match=words):
            list(SOURCES["xm3600-parquet"]((str(tmp_path / folder),)).pieces())


def test_vidore_as_published_has_each_page_once_with_all_its_questions(tmp_path, picture, capsys):
    rows = [("what is a", 0), ("what is b", 1), (None, 2), ("what is a", 3), ("what is c", 0), ("what is b", 1)]
    table = [{"query": query, "image": {"bytes": picture(page), "path": None}, "image_filename": f"p{page}.png",
              "answer": "x"} for query, page in rows]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(table[:4]), tmp_path / "test-00000-of-00002.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(table[4:]), tmp_path / "test-00001-of-00002.parquet")
    found = pool(tmp_path / "eval", ["vidore-rows", str(tmp_path), "--name", "DocQ"])
    assert (len(found.images), found.documents) == (4, True)
    asked = [(0, "what is a"), (0, "what is c"), (1, "what is b"), (3, "what is a")]
    assert found.texts == {"en": asked}
    pages = Pages.open(find(tmp_path / "eval").sets[0].directory)
    assert [query.grades for query in pages.queries["en"].values()] == [{0: 1, 3: 1}, {0: 1}, {1: 1}]
    other = tmp_path / "other.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(table[2:3]), other)
    assert main(["evalset", "vidore-rows", str(other), "--name", "x", "--out", str(tmp_path / "e")]) == 2
    assert "no row has a question and its page" in capsys.readouterr().err
