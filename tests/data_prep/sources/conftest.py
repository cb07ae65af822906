"""Fixtures: images made here, and an import whose whole outcome is read back."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from data_prep.execute import Execution, Target
from data_prep.shards import KINDS, Dataset
from data_prep.sources import EVALSETS, SOURCES
from data_prep.sources.importing import import_source
from PIL import Image


@dataclass
class Sample:
    """A sample that was read back: its row, its image and extension if it has one, its parsed .json."""

    row: Any
    image: bytes | None
    extension: str | None
    content: dict[str, Any]

    @property
    def captions(self) -> list[str]:
        return [text["text"] for text in self.content["captions"]]

    @property
    def size(self) -> tuple[int, int]:
        assert self.image is not None
        with Image.open(io.BytesIO(self.image)) as image:
            return image.size


@dataclass
class Outcome:
    """What an import gave: samples by kind, and the receipt."""

    samples: dict[str, list[Sample]]
    receipt: dict[str, Any]

    @property
    def dropped(self) -> dict[str, int]:
        return self.receipt["dropped"]


def read_back(directory: Path) -> list[Sample]:
    """Every sample of a data set, its checksums verified."""
    dataset = Dataset.open(directory, verify=True)
    found = []
    for index in range(len(dataset)):
        members = dataset.read(index)
        extension = next((name for name in ("jpg", "png", "webp") if name in members), None)
        image = members[extension] if extension else None
        found.append(Sample(dataset.row(index), image, extension, json.loads(members["json"])))
    return found


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """The bytes of an image file, a gradient shaded by the number: picture(3), picture(3, (640, 480), "PNG")."""

    def make(number: int = 0, size: tuple[int, int] = (64, 48), encoding: str = "JPEG", mode: str = "RGB") -> bytes:
        image = Image.linear_gradient("L").resize(size).point(lambda value: (value + 9 * number) % 256).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, encoding)
        return buffer.getvalue()

    return make


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Outcome]:
    """Imports a source in this process: run("images", folder="…") gives the outcome."""

    def run(title: str, *, out: Path | None = None, evalset: bool = False, image: Any = None, **values: Any) -> Outcome:
        out = out or tmp_path / "out"
        plain = {
            name: tuple(map(str, v)) if isinstance(v, list) else str(v) if isinstance(v, Path) else v
            for name, v in values.items()
        }
        source = (EVALSETS if evalset else SOURCES)[title](**plain)
        receipt = import_source(
            source,
            Target(str(out), title),
            title=title,
            evalset=evalset,
            image=image,
            execution=Execution(workers=1),
            log=lambda line: None,
        )
        assert receipt is not None
        samples = {kind: read_back(out / kind / title) for kind in KINDS if (out / kind / title).exists()}
        assert {kind: len(found) for kind, found in samples.items()} == receipt["went_out"]
        return Outcome(samples, receipt)

    return run


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder, by name: to see that a source is as it was."""
    return lambda folder: {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_pdf(path: Path, pages: list[str], box: tuple[int, int] = (300, 400)) -> Path:
    """A PDF with one line of text a page, written by hand; an empty one is a page without text."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for text in pages:
        stream = f"BT /F1 24 Tf 20 200 Td ({text}) Tj ET" if text else "0 0 50 50 re f"
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {box[0]} {box[1]}] /Contents {len(objects)} 0 R "
            "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(pages)} >>"
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    data += f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}".encode()
    data += f"trailer << /Size {len(places) + 1} /Root 1 0 R >>\nstartxref\n{data.index(b'xref')}\n%%EOF\n".encode()
    path.write_bytes(data)
    return path
