"""Fixtures: a drawn corpus, and Debian packages small enough to read here, in the real formats."""

from __future__ import annotations

import io
import json
import lzma
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from data_prep.cli import main
from data_prep.corpus import Settings, build_corpus
from data_prep.execute import progress
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image

DRAWN = Settings(drawn=150, image_size=32)


@pytest.fixture(autouse=True)
def no_lines_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests count the lines on stderr; on a busy machine a command may take long enough for a line of progress."""
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", math.inf)


@pytest.fixture(scope="session")
def drawn_settings() -> Settings:
    return DRAWN


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn corpus of 150 pictures; read it, do not change it."""
    out = tmp_path_factory.mktemp("drawn") / "corpus"
    build_corpus(out, DRAWN, log=lambda line: None)
    return out


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data set of `samples` pictures, three to a shard; gives its folder."""

    def write(name: str = "data", samples: int = 7) -> Path:
        directory = tmp_path / name
        with DatasetWriter(directory, kind="image-short", source="made", samples_per_shard=3) as writer:
            for number in range(samples):
                caption = json.dumps({"captions": [], "source": "made", "item": f"item-{number}"}).encode()
                members = {"png": bytes([number]) * (100 * number + 1), "json": caption}
                writer.write(f"key-{number}", members, languages=["de", "zh"], tokens=number)
        return directory

    return write


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, list[tuple[str, bytes]]], Path]:
    """Writes a tar of these members; gives its path."""

    def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def read_all() -> Callable[[Path], list[dict]]:
    """The parsed JSON of every sample of a data set."""

    def read(directory: Path) -> list[dict]:
        dataset = Dataset.open(directory)
        return [json.loads(dataset.read(index)["json"]) for index in range(len(dataset))]

    return read


@pytest.fixture(scope="session")
def make_deb() -> Callable[[Path, str, dict[str, bytes]], Path]:
    """Writes a Debian package, `ar` archive and all: make_deb(folder, "name_version", {path: bytes})."""

    def make(folder: Path, name: str, files: dict[str, bytes]) -> Path:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for path, data in files.items():
                info = tarfile.TarInfo(f"./{path}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": lzma.compress(buffer.getvalue())}
        archive = b"!<arch>\n"
        for member, data in members.items():
            archive += f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
            archive += data + b"\n" * (len(data) % 2)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}_all.deb"
        path.write_bytes(archive)
        return path

    return make


@pytest.fixture(scope="session")
def dual_encoder(drawn, tmp_path_factory):
    """A directory as `DualEncoder.save_pretrained` writes it, of random towers, and the towers."""
    import torch
    from stage_trainer import DualEncoder
    from text_tower import TextTower, TextTowerConfig
    from text_tower.tokenizer import Tokenizer
    from vision_tower import VisionTower, VisionTowerConfig

    torch.manual_seed(0)
    tower = TextTower(TextTowerConfig(vocab_size=386, width=32, layers=1, heads=2, mlp_width=64))
    tower.tokenizer = Tokenizer.from_file(drawn / "tokenizer.model")
    vision = VisionTower(VisionTowerConfig(resolution=16, patch=8, width=32, layers=1, heads=2, reference_grid=None))
    folder = tmp_path_factory.mktemp("model") / "dual"
    DualEncoder(tower, vision).save_pretrained(folder)
    return folder, DualEncoder.from_pretrained(folder)


SHOWN = "shards/image-short/shown"
# Commands that write data sets, as they are given in the folder `place`, without --out and --name.
MAKERS = {
    "import texts": ["import", "texts", "pairs.jsonl", "--workers", "1"],
    "import images": ["import", "images", "pictures", "--workers", "1"],
    "held out": ["import", "images", "pictures", "--held-out", "0.5", "--workers", "1"],
    "index": ["index", SHOWN, "--workers", "1"],
    "dedup": ["dedup", "texts", "--workers", "1"],
    "dedup images": ["dedup", SHOWN, "--workers", "1"],
    "languages": ["languages", "texts", "--sure", "1", "--workers", "1"],
}


@pytest.fixture(scope="session")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures and their table, text pairs as JSON lines, and data sets of both; do not change them."""
    folder = tmp_path_factory.mktemp("stocked") / "deep" / "place"
    (folder / "pictures").mkdir(parents=True)
    rows = ["file,caption"]
    for number in range(4):
        Image.new("RGB", (40, 30), (number * 60, 20, 90)).save(folder / "pictures" / f"{number}.png")
        rows.append(f"{number}.png,picture number {number} of four")
    (folder / "pictures" / "captions.csv").write_text("\n".join(rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps([f"question {n}", f"answer {n}"]) + "\n" for n in range(4)))
    with DatasetWriter(folder / "texts", kind="text-pairs", source="made") as writer:
        for number in range(4):
            text = {"text": f"text {number}", "language": "en", "origin": "human", "role": "body"}
            content = json.dumps({"query": [text], "target": [text]}).encode()
            writer.write(f"key-{number}", {"json": content}, languages=["en"], tokens=None)
    out = str(folder / "shards")
    assert main(["import", "images", str(folder / "pictures"), "--out", out, "--name", "shown", "--workers", "1"]) == 0
    return folder


@pytest.fixture
def place(stocked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `stocked`, in which the test runs."""
    monkeypatch.chdir(stocked)
    return stocked


def files(folder: Path) -> set[str]:
    """Everything below a folder, by its name from there."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
