"""PDF pages as images: folders of PDF with their text layer, and TAT-DQA's questions about pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from data_prep.errors import UserError
from data_prep.sources.pdf import PdfFolder
from data_prep.sources.pdf_pages import OUT_OF_MEMORY, PdfGivenUp, PdfPages, PdfRefused

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
        "PDF that is missing": 1,
        "no answer": 1,
        "no document or no questions": 2,
        "not a JSON object": 1,
    }


def write_endless(path: Path, pages: int) -> None:
    """A PDF whose pages draw a form that draws another one twice, and so on, 24 deep."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    for depth in range(24):
        form = f"/Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << /XObject << /X {depth + 4} 0 R >> >>"
        objects.append(f"<< {form} /Length 11 >>\nstream\n/X Do /X Do\nendstream")
    end = "<< /Type /XObject /Subtype /Form /BBox [0 0 9 9] /Length 13 >>\nstream\n0 0 1 1 re f \nendstream"
    objects += [end, "<< /Length 5 >>\nstream\n/X Do\nendstream"]
    content = len(objects)
    page = f"/Type /Page /Parent 2 0 R /MediaBox [0 0 90 90] /Contents {content} 0 R"
    objects += [f"<< {page} /Resources << /XObject << /X 3 0 R >> >> >>"] * pages
    kids = " ".join(f"{content + 1 + number} 0 R" for number in range(pages))
    objects[1] = f"<< /Type /Pages /Kids [{kids}] /Count {pages} >>"
    write_objects(path, [one.encode() for one in objects])


def write_objects(path: Path, objects: list[bytes]) -> None:
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    trailer = f"trailer << /Size {len(places) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    path.write_bytes(data + f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}{trailer}".encode())


def test_a_page_without_an_end_is_given_up_and_the_rest_goes_on(tmp_path, run, monkeypatch):
    monkeypatch.setattr("data_prep.sources.pdf._GIVEN_UP", 1)
    folder = tmp_path / "pdf"
    folder.mkdir()
    write_endless(folder / "a.pdf", pages=3)
    write_pdf(folder / "b.pdf", ["sound"])
    found = run("pdf", folder=[folder], page_seconds=1)
    assert [sample.captions for sample in found.samples["image-long"]] == [["sound"]]
    left = "page of a PDF of which 1 pages were given up"
    assert found.dropped == {"page given up after 1 s": 1, left: 2}
    assert found.receipt["examples"] == {"page given up after 1 s": ["a.pdf, page 1"], left: ["a.pdf, page 2"]}


def test_a_process_that_needs_too_much_memory_ends_by_itself():
    code = (
        "import threading, time; from data_prep.sources import pdf_process as p; p._MEMORY = 300 * 2**20\n"
        "threading.Thread(target=p._watch_memory, daemon=True).start(); time.sleep(0.2); print('small', flush=True)\n"
        "held = b'x' * (400 * 2**20); time.sleep(300)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("small\n", OUT_OF_MEMORY)


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, run):
    """By its own words: 30,000 x 30,000 pixels would be 2.7 GB."""
    (tmp_path / "pdf").mkdir()
    text = b"BT /F1 24 Tf 20 20 Td (a page) Tj ET q 50 0 0 50 0 0 cm /I Do Q"
    pixels = zlib.compress(bytes(1000))
    image = b"/Type /XObject /Subtype /Image /ColorSpace /DeviceRGB /BitsPerComponent 8 /Filter /FlateDecode"
    for name, side in (("bomb", 30_000), ("photo", 10)):
        objects = [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 90 90] /Contents 4 0 R /Resources << /XObject << /I 5 0 R >>"
            b" /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
            b"<< /Length %d >>\nstream\n%b\nendstream" % (len(text), text),
            b"<< %b /Width %d /Height %d /Length %d >>\nstream\n%b\nendstream"
            % (image, side, side, len(pixels), pixels),
        ]
        write_objects(tmp_path / f"pdf/{name}.pdf", objects)
    found = run("pdf", folder=[tmp_path / "pdf"])
    assert [sample.content["item"] for sample in found.samples["image-long"]] == ["pdf/photo.pdf/1"]
    assert found.dropped == {"page with an image of more pixels than allowed": 1}


def test_after_the_process_has_died_the_next_page_is_drawn_by_another(tmp_path):
    path = write_pdf(tmp_path / "a.pdf", ["one", "two"])
    with PdfPages(64, 60) as pages:
        assert (pages.count(path), pages.draw(path, 1)[1]) == (2, "two")
        with pytest.raises(PdfRefused, match="that cannot be read"):
            pages.count(tmp_path / "none.pdf")
        first = pages._process
        first.kill()
        with pytest.raises(PdfGivenUp, match="that cannot be drawn"):
            pages.draw(path, 0)
        assert pages.draw(path, 0)[1] == "one"
        last = pages._process
    assert last is not first
    assert last.poll() is not None


def test_files_that_share_a_name_are_items_of_their_own(tmp_path, run):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_pdf(tmp_path / folder / "x.pdf", [f"in {folder}"])
    write_pdf(tmp_path / "a/y.pdf", ["alone"])
    found = run("pdf", folder=[tmp_path / "a", tmp_path / "b", tmp_path / "a/y.pdf"])
    items = [sample.content["item"] for sample in found.samples["image-long"]]
    assert items == [f"pdf/{tmp_path}/a/x.pdf/1", "pdf/y.pdf/1", f"pdf/{tmp_path}/b/x.pdf/1"]


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
