"""WIT: seventeen columns, Hebrew as iw, short and long captions as the paper has them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from data_prep.errors import UserError
from data_prep.sources.wit import COLUMNS


def row(**fields: str) -> list[str]:
    return [fields.get(name, "") for name in COLUMNS]


def write(path: Path, rows: list[list[str]]) -> Path:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter="\t").writerows([COLUMNS, *rows])
    raw = buffer.getvalue().encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


FULL = {
    "language": "iw",
    "image_url": "https://upload.wikimedia.org/wikipedia/commons/a/a1/Caf%C3%A9_%22x%22.jpg",
    "page_title": "עמוד",
    "section_title": "עמוד",
    "caption_reference_description": "כיתוב, with\ta tab",
    "context_page_description": "ארוך\nבשתי שורות",
    "context_section_description": "סעיף",
}


@pytest.fixture
def images(tmp_path, picture) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / 'images/Café_"x".jpg').write_bytes(picture())
    return tmp_path / "images"


@pytest.mark.parametrize("name", ["wit_v1.train.tsv", "wit_v1.train.tsv.gz"])
def test_short_is_the_reference_description_and_long_the_five_in_order(tmp_path, images, run, name):
    found = run("wit", paths=[write(tmp_path / name, [row(**FULL)])], images=images)
    (short,), (long,) = found.samples["image-short"], found.samples["image-long"]
    assert short.captions == ["כיתוב, with\ta tab"]
    assert long.captions == ["כיתוב, with\ta tab\nעמוד\nארוך\nבשתי שורות\nסעיף"]  # an equal section title once
    assert long.content["captions"][0]["origin"] == "human:joined"
    assert short.row.languages == long.row.languages == ("he",)
    assert short.content["item"] == long.content["item"] == f"wit/{FULL['image_url']}"


def test_rows_without_caption_image_or_address_are_counted(tmp_path, images, run):
    rows = [
        row(**FULL),
        row(**{**FULL, "caption_reference_description": "", "language": "de"}),  # a long caption all the same
        row(**{**FULL, "context_page_description": "", "context_section_description": ""}),  # a short one alone
        row(language="en", image_url=FULL["image_url"], page_title="title alone"),
        row(**{**FULL, "image_url": "https://upload.wikimedia.org/gone.jpg"}),
        row(**{**FULL, "image_url": ""}),
        row(**{**FULL, "image_url": "http://[half/an/address.jpg"}),
        row(**{**FULL, "image_url": "https://upload.wikimedia.org/%2e%2e%2fsecret.jpg"}),
    ]
    found = run("wit", paths=[write(tmp_path / "w.tsv", rows)], images=images)
    assert found.receipt["went_out"] == {"image-long": 2, "image-short": 2}
    assert found.dropped == {"no caption": 1, "no image address": 3, "no such image file": 1}


def test_an_img2dataset_download_that_kept_the_columns_needs_no_table(tmp_path, run, picture):
    folder = tmp_path / "downloads"
    folder.mkdir()
    # img2dataset renames --url_col and --caption_col, and cannot save them as additional columns too
    renamed = {"image_url": "url", "caption_reference_description": "caption"}
    kept = {renamed.get(name, name): value for name, value in FULL.items()}
    metadata = {**kept, "key": "000000000", "status": "success", "error_message": None, "sha256": "ab"}
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for extension, data in (("jpg", picture()), ("json", json.dumps(metadata).encode())):
            info = tarfile.TarInfo(f"000000000.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / "00000_stats.json").write_text('{"count": 1, "successes": 1}')
    found = run("wit", paths=[folder])
    assert found.samples["image-short"][0].captions == ["כיתוב, with\ta tab"]
    assert found.samples["image-long"][0].captions == ["כיתוב, with\ta tab\nעמוד\nארוך\nבשתי שורות\nסעיף"]
    assert found.samples["image-long"][0].row.languages == ("he",)


def test_a_table_without_images_or_without_its_columns_is_refused(tmp_path, images, run):
    path = write(tmp_path / "w.tsv", [row(**FULL)])
    with pytest.raises(UserError, match="addresses alone; name the folder of the images"):
        run("wit", paths=[path])
    path.write_text("language\timage_url\nen\tx\n")
    with pytest.raises(UserError, match="lacks WIT's columns page_url, page_title"):
        run("wit", paths=[path], images=images)


def test_images_of_one_name_at_two_addresses_are_not_mixed_up(tmp_path, images, run, picture):
    host = "https://upload.wikimedia.org/wikipedia"
    rows = [
        row(language="en", image_url=f"{host}/{place}/a/a1/Logo.jpg", caption_reference_description=place)
        for place in ("commons", "en", "commons")
    ]
    table = write(tmp_path / "w.tsv", [*rows, row(**FULL)])
    (images / "Logo.jpg").write_bytes(picture(1))
    found = run("wit", paths=[table], images=images, out=tmp_path / "flat")
    assert [sample.captions for sample in found.samples["image-short"]] == [["כיתוב, with\ta tab"]]
    assert found.dropped == {"image by a name that several addresses share; keep it under its address's path": 3}
    for number, place in enumerate(("wikipedia/commons/a/a1", "en/a/a1"), 2):
        (images / place).mkdir(parents=True)
        (images / place / "Logo.jpg").write_bytes(picture(number))
    samples = run("wit", paths=[table], images=images, out=tmp_path / "deep").samples["image-short"]
    assert [(s.captions[0], s.image) for s in samples[:3]] == [
        ("commons", picture(2)), ("en", picture(3)), ("commons", picture(2))
    ]  # fmt: skip
