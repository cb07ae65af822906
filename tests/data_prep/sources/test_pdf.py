"""PDF pages as images: folders of PDF with their text layer, and TAT-DQA's questions about pages."""

from __future__ import annotations

import json
import os

import pytest
from data_prep.errors import UserError
from data_prep.sources.pdf import PdfFolder

from .conftest import write_pdf


def test_a_page_is_a_sample_with_its_text(tmp_path, run):
    folder = tmp_path / "pdf"
    (folder / "sub").mkdir(parents=True)
    write_pdf(folder / "a.pdf", ["Hello page one", "", "Third page"])
    write_pdf(folder / "sub/b.PDF", ["Wide"], box=(800, 400))
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing more")
    found = run("pdf", folder=[folder], language="en")
    samples = found.samples["image-long"]
    assert [sample.captions for sample in samples] == [["Hello page one"], ["Third page"], ["Wide"]]
    assert [sample.content["item"] for sample in samples] == ["pdf/a.pdf/1", "pdf/a.pdf/3", "pdf/sub/b.PDF/1"]
    assert [sample.size for sample in samples] == [(1024, 1366), (1024, 1366), (2048, 1024)]
    assert samples[0].extension == "png"
    assert found.dropped == {"PDF that cannot be read": 1, "page without text": 1}


def test_a_page_of_absurd_size_is_drawn_within_bounds(tmp_path, run):
    (tmp_path / "pdf").mkdir()
    write_pdf(tmp_path / "pdf/strip.pdf", ["long"], box=(90, 14000))
    (sample,) = run("pdf", folder=[tmp_path / "pdf"]).samples["image-long"]
    assert max(sample.size) <= 4096


def test_pages_beyond_the_limit_are_counted(tmp_path, run):
    (tmp_path / "pdf").mkdir()
    write_pdf(tmp_path / "pdf/a.pdf", ["one", "two", "three"])
    found = run("pdf", folder=[tmp_path / "pdf"], max_pages=1)
    assert (len(found.samples["image-long"]), found.dropped) == (1, {"page beyond --max-pages": 2})


def test_tatdqa_takes_the_page_of_the_answer(tmp_path, run):
    documents = tmp_path / "train"
    documents.mkdir()
    write_pdf(documents / "aa11.pdf", ["first", "second"])
    pages = [
        {"bbox": [0, 0, 1, 1], "blocks": [{"uuid": f"block-{page}", "text": "t", "order": 1}]} for page in range(2)
    ]
    (documents / "aa11.json").write_text(json.dumps({"pages": pages}))
    write_pdf(documents / "bb22.pdf", ["alone", "and more"])

    def ask(text: str, answer: object, block: str = "block-0", scale: str = "") -> dict:
        return {
            "uid": "q",
            "order": 1,
            "question": text,
            "answer": answer,
            "answer_type": "span",
            "scale": scale,
            "derivation": "",
            "facts": [],
            "req_comparison": False,
            "block_mapping": [{block: [0, 4]}],
        }

    content = [
        {
            "doc": {"uid": "aa11", "page": 1, "source": "x.pdf"},
            "questions": [
                ask("When?", ["2019", "2018"]),
                ask("How much?", 12.5, "block-1", "million"),
                ask("Which?", "the last", "block-1"),
                ask("None?", None),
                "odd",
            ],
        },
        {"doc": {"uid": "bb22", "page": 7, "source": "y.pdf"}, "questions": [ask("Count?", 3)]},
        {"doc": {"uid": "gone", "page": 1, "source": "z.pdf"}, "questions": [ask("Where?", "there")]},
        {"doc": {"uid": "../../x", "page": 1, "source": "z.pdf"}, "questions": [ask("Where?", "there")]},
        {"questions": []},
    ]
    (tmp_path / "tatdqa_dataset_train.json").write_text(json.dumps(content))
    found = run("tatdqa", questions=tmp_path / "tatdqa_dataset_train.json", documents=documents)
    assert [(sample.content["item"], sample.captions) for sample in found.samples["image-long"]] == [
        ("tatdqa/aa11/1", ["When? 2019, 2018"]),
        ("tatdqa/aa11/2", ["How much? 12.5 million", "Which? the last"]),
        ("tatdqa/bb22/1", ["Count? 3"]),
    ]
    assert found.receipt["notes"] == {"documents of several pages without UID.json, first page taken": 1}
    assert found.dropped == {
        "PDF that is missing or cannot be read": 1,
        "no answer": 1,
        "no document or no questions": 2,
        "not a JSON object": 1,
    }


def test_without_the_library_the_extra_is_named(tmp_path, run, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "pypdfium2", None)
    with pytest.raises(UserError, match=r"reading PDF needs pypdfium2.*pip install './data_prep\[pdf\]'"):
        run("pdf", folder=[tmp_path])


def test_a_file_that_was_edited_makes_another_piece(tmp_path):
    write_pdf(tmp_path / "a.pdf", ["one"])
    source = PdfFolder((str(tmp_path),))
    before = list(source.pieces())
    assert list(source.pieces()) == before
    os.utime(tmp_path / "a.pdf", ns=(1, 1))
    assert list(source.pieces()) != before
