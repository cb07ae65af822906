"""MDS shards as mosaicml-streaming writes them, and damaged ones."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from data_prep.errors import UserError
from PIL import Image

# What `WRITER` below made with mosaicml-streaming 0.13.0 and zstd, with one image column.
SHARD = """
KLUv/WDHAzUNADbVTT1AjZo1GwvjKIaZomMGjHRywX4fOtPoqSLR8iZSYky6R8huwY8M+PBzA541HFovJj4ExSUKxCW/BQb/XrJTOwA/
ADkAVqSwOqnkTQpTarfKmtkJJVjVSK6V08aLonlOetu1j8R1PItVeWVWjSaVnszMeilvMfHRykMV/nHwRwEqG1u08JyEgCOT0cAk4JBU
TpPIkRYDN/ZtLNxc9EK6ZRKuaznPdVgbN41mnDTnSeVIe+NmRatVeCONGKTyajAVF+hoqqrSbLBWLkRYMFEEfowUITz8A4h+yz8yPaAu
/wXGxeUjRESD03AjOifgb+AH+Qf8Ij/1WwQRBEEbEfQ8mAMdHpCMDxxAWDoRtMfHyF+h8uKFVThfSokJAoZnAb+CKsBvoWBgo3/6nwyV
B4kppAGFcoEiqjMCMCCQAjKa3fCA/RyVK0Uxiaz9HJUrFcVcui0OH1mHxXOj/cMbGpYQuJZJns58wTBlPEX0TiGaPhXLDv6mvUFiZeNi
i6c19qwaEAMEd7MvDUMpV7WDMcDSHSiLVJx+xGSaCm+INjYjYDtHi0IB
"""
NAMES = {"caption": "str", "image": "bytes", "l": "list[png]", "meta": "json", "n": "int", "p": "pil", "secret": "pkl"}


def index(compression: str = "", **changes: object) -> dict:
    shard = {
        "column_encodings": list(NAMES.values()),
        "column_names": list(NAMES),
        "column_sizes": [8 if encoding == "int" else None for encoding in NAMES.values()],
        "compression": compression or None,
        "format": "mds",
        "hashes": [],
        "raw_data": {"basename": "shard.00000.mds", "bytes": 1223, "hashes": {}},
        "samples": 3,
        "size_limit": 67108864,
        "version": 2,
        "zip_data": {"basename": "shard.00000.mds.zstd", "bytes": 432, "hashes": {}} if compression else None,
    }
    return {"shards": [{**shard, **changes}], "version": 2}


@pytest.fixture
def folder(tmp_path) -> Callable[..., Path]:
    def write(raw: bytes | None = None, **changes: object) -> Path:
        place = tmp_path / "mds"
        place.mkdir(exist_ok=True)
        (place / "shard.00000.mds").write_bytes(unpacked() if raw is None else raw)
        (place / "index.json").write_text(json.dumps(index(**changes)))
        return place

    return write


def unpacked() -> bytes:
    return pyarrow.input_stream(io.BytesIO(base64.b64decode(SHARD)), compression="zstd").read()


def check(found) -> None:
    assert [sample.captions for sample in found.samples["image-short"]] == [[f"a\u2028 {n} "] for n in range(3)]
    assert [sample.size for sample in found.samples["image-short"]] == [(4, 3)] * 3
    assert found.samples["image-short"][0].row.languages == ("de",)


def test_shards_packed_or_not_give_the_samples_word_for_word(folder, run, tmp_path, monkeypatch):
    import data_prep.sources.mds as module

    monkeypatch.setattr(module, "_ROWS", 2)
    options = {"image_column": "image", "language_column": "meta.lang", "caption_column": "caption"}
    found = run("mds", data=folder(), **options)
    check(found)
    assert found.receipt["job"]["units"] == 2
    place = folder(compression="zstd:3")
    (place / "shard.00000.mds").unlink()
    (place / "shard.00000.mds.zstd").write_bytes(base64.b64decode(SHARD))
    check(run("mds", data=tmp_path, split="mds", out=tmp_path / "out2", **options))


@pytest.mark.parametrize(("column", "size"), [("p", (5, 4)), ("l", (3, 3))])
def test_images_of_other_encodings(folder, run, column, size):
    found = run("mds", data=folder(), image_column=column)
    assert {sample.size for sample in found.samples["image-short"]} == {size}


def test_several_image_columns_are_asked_for_and_pickles_are_not_read(folder, run):
    with pytest.raises(UserError, match="image may be image or l or p; say --image-column"):
        run("mds", data=folder())
    with pytest.raises(UserError, match="nothing went out"):
        run("mds", data=folder(), image_column="secret")


def test_texts_are_texts(folder, run, tmp_path):
    names = {"sentence1": "str", "sentence2": "str", "label": "int"}
    rows = [("Où?", "Là.", 1), ("a", "b", 0)]
    samples = []
    for one, two, label in rows:
        texts = [text.encode() for text in (one, two)]
        samples.append(
            b"".join(len(text).to_bytes(4, "little") for text in texts) + b"".join(texts) + label.to_bytes(8, "little")
        )
    starts = [4 + 4 * 3]
    for sample in samples:
        starts.append(starts[-1] + len(sample))
    raw = b"".join(number.to_bytes(4, "little") for number in (2, *starts)) + b"".join(samples)
    encodings, sizes = list(names.values()), [None, None, 8]
    place = folder(raw, column_names=list(names), column_encodings=encodings, column_sizes=sizes, samples=2)
    found = run("mds", data=place, language="fr")
    (pair,) = found.samples["text-pairs"]
    assert (pair.content["query"][0]["text"], pair.content["target"][0]["text"]) == ("Où?", "Là.")
    assert sum(found.dropped.values()) == 1


def test_damaged_samples_cost_themselves(folder, run):
    raw = bytearray(unpacked())
    place = raw.index("\u2028 1 ".encode())
    raw[place] = 0xFF
    found = run("mds", data=folder(bytes(raw[:-200])), image_column="image", caption_column="caption")
    assert found.receipt["went_out"] == {"image-short": 1}
    assert found.dropped == {"sample that cannot be read": 2}
    assert [where.partition(" (")[0] for where in found.receipt["examples"]["sample that cannot be read"]] == [
        "shard.00000.mds, sample 2",
        "shard.00000.mds, sample 3",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"format": "csv"},
        {"samples": -1},
        {"column_names": ["caption"]},
        {"raw_data": {"basename": "../other.mds", "bytes": 1}},
        {"raw_data": None},
    ],
)
def test_an_index_of_another_form_is_refused(folder, run, changes):
    with pytest.raises(UserError, match="not an index of MDS"):
        run("mds", data=folder(**changes))


def test_what_is_missing_is_said(folder, run, tmp_path):
    folder()
    with pytest.raises(UserError, match="holds no index.json of MDS; --split may be mds"):
        run("mds", data=tmp_path)
    (tmp_path / "mds" / "shard.00000.mds").unlink()
    with pytest.raises(UserError, match="index.json names this shard, which cannot be read"):
        run("mds", data=tmp_path / "mds", image_column="image")
    (tmp_path / "mds" / "shard.00000.mds.zstd").write_bytes(base64.b64decode(SHARD)[:300])
    (tmp_path / "mds" / "index.json").write_text(json.dumps(index("zstd")))
    with pytest.raises(UserError, match="cannot be unpacked as zstd"):
        run("mds", data=tmp_path / "mds", image_column="image")


WRITER = """
import io, sys
from PIL import Image
from streaming import MDSWriter
buffer = io.BytesIO()
Image.new("L", (4, 3), 90).save(buffer, "PNG")
for compression in (None, "zstd", "gz", "br:9", "bz2", "snappy"):
    columns = dict(image="bytes", caption="str", n="int", meta="json", p="pil", l="list[png]", secret="pkl")
    with MDSWriter(out=f"{sys.argv[1]}/{compression}", columns=columns, compression=compression) as writer:
        for n in range(3):
            values = dict(image=buffer.getvalue(), caption=f"a\\u2028 {n} ", n=n, meta={"lang": "de"}, secret={1})
            writer.write(values | dict(p=Image.new("RGB", (5, 4), (n, 2, 3)), l=[Image.new("L", (3, 3))]))
"""


@pytest.mark.full
def test_what_mosaicml_streaming_writes_today_is_read_in_every_compression(run, tmp_path):
    environment, uv = tmp_path / "env", Path(sys.executable).with_name("uv")
    python = environment / "bin/python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    packages = ["mosaicml-streaming", "brotli", "python-snappy", "cramjam", "zstd", "catalogue"]
    subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", python, *packages], check=True)
    others = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    subprocess.run([python, "-c", others + WRITER, tmp_path / "made"], check=True)
    for place in sorted((tmp_path / "made").iterdir()):
        options = {"image_column": "image", "language_column": "meta.lang", "caption_column": "caption"}
        check(run("mds", data=place, out=tmp_path / f"out-{place.name}", **options))
        found = run("mds", data=place, out=tmp_path / f"p-{place.name}", image_column="p")
        assert [Image.open(io.BytesIO(s.image)).size for s in found.samples["image-short"]] == [(5, 4)] * 3
