"""Image bytes do not choose their decoder: formats are named wherever an image is opened, and no program is started."""

import ast
import contextlib
import io
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image, features
from vision_tower import ImageError, load_image, preprocess
from vision_tower.preprocess import FORMATS

ROOT = Path(__file__).parents[2]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A `gs` on PATH that leaves a mark when it is started."""
    mark, folder = tmp_path / "started", tmp_path / "bin"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\ntouch '{mark}'\nexit 1\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow remembers the one that it found
    return mark


def test_an_eps_named_png_starts_no_ghostscript(ghostscript, tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(EPS)
    for source in (file, str(file), EPS, bytearray(EPS), memoryview(EPS)):
        for read in (load_image, lambda source: preprocess(source, 8)):
            with pytest.raises(ImageError, match="cannot be decoded as an image: it is broken, or none of JPEG"):
                read(source)
    assert not ghostscript.exists()
    with contextlib.suppress(OSError, subprocess.SubprocessError), Image.open(io.BytesIO(EPS)) as opened:
        opened.load()  # what Pillow does by itself
    assert ghostscript.exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_named_is_read(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (10, 200, 30)).save(buffer, kind)
    assert load_image(buffer.getvalue()).size == (9, 7)


def test_no_image_is_opened_in_a_format_that_is_not_named():
    files = [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("data_prep/src/**/*.py"), *ROOT.glob("*/benchmarks/*.py")]
    assert len(files) > 100
    calls = 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                calls += 1
                assert "formats" in [keyword.arg for keyword in node.keywords], f"{file}:{node.lineno}"
    assert calls > 8
