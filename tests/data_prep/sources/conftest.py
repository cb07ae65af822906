"""Fixtures: images made here, and an import whose whole outcome is read back."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from data_prep.execute import Execution, Target
from data_prep.shards import KINDS, Dataset
from data_prep.sources import EVALSETS, SOURCES
from data_prep.sources.importing import import_source
from PIL import Image


@dataclass
class Sample:
    """A sample that was read back: its row, its image and extension if it has one, its parsed .json, its hard-negative
    images."""

    row: Any
    image: bytes | None
    extension: str | None
    content: dict[str, Any]
    negatives: list[bytes]

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
        further = sorted((name for name in members if name.startswith("negative-")), key=lambda name: int(name[9:-4]))
        negatives = [members[name] for name in further]
        found.append(Sample(dataset.row(index), image, extension, json.loads(members["json"]), negatives))
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
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub on loopback, for programs that are started: the folder of the files of the data set someone/something."""
    files, commit = tmp_path / "repo", "0123456789abcdef0123456789abcdef01234567"
    files.mkdir()

    def entry(path: Path) -> dict[str, Any]:
        kind, name = "file" if path.is_file() else "directory", str(path.relative_to(files))
        return {"type": kind, "path": name, "size": path.stat().st_size, "oid": name.replace("/", "-")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            place = self.path.partition("?")[0]
            names = sorted(str(path.relative_to(files)) for path in files.rglob("*") if path.is_file())
            if place.startswith("/api/datasets/someone/something/tree/"):
                inside = files / place.split("/", 7)[7] if place.count("/") > 6 else files
                found = inside.rglob("*") if "recursive=true" in self.path.lower() else inside.glob("*")
                self._send(json.dumps([entry(path) for path in sorted(found)]).encode())
            elif place.startswith("/api/datasets/someone/something/paths-info/"):
                asked = self._asked()
                self._send(json.dumps([entry(files / name) for name in names if name in asked]).encode())
            elif place == "/api/datasets/someone/something" or place.startswith("/api/datasets/someone/something/rev"):
                siblings = [{"rfilename": name} for name in names]
                told = {"id": "someone/something", "sha": commit, "siblings": siblings, "private": False, "tags": []}
                self._send(json.dumps({**told, "downloads": 0, "disabled": False, "gated": False}).encode())
            elif place.startswith("/datasets/someone/something/resolve/"):
                name = place.split("/", 6)[6]
                known = (files / name).is_file()
                self._send((files / name).read_bytes() if known else b"", 200 if known else 404, name)
            else:
                self._send(b"{}", 404)

        do_HEAD = do_POST = do_GET

        def _asked(self) -> str:
            return self.rfile.read(int(self.headers.get("Content-Length", 0))).decode().replace("%2F", "/")

        def _send(self, body: bytes, status: int = 200, etag: str = "") -> None:
            self.send_response(status)
            for name, value in {
                "Content-Length": str(len(body)),
                "Content-Type": "application/json",
                "X-Repo-Commit": commit,
                "ETag": f'"{etag}"',
                **({"X-Error-Code": "EntryNotFound" if etag else "RepoNotFound"} if status == 404 else {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Nothing is said."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }.items():
        monkeypatch.setenv(name, value)
    yield files
    server.shutdown()
    server.server_close()


@pytest.fixture
def say_to_hub(hub: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Starts `data-prep import` with these words; its hub is `hub`."""
    program = "import sys; from data_prep.cli import main; sys.exit(main(['import', *sys.argv[1:], '--workers', '1']))"

    def say(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)

    return say


@pytest.fixture(name="read_back")
def _read_back() -> Callable[[Path], list[Sample]]:
    return read_back


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
