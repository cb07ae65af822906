"""Fixtures: a source of many small units, and imports of it by the command line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before Ray is imported: its token stands in the home folder, where clusters of other processes replace it.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def write_img2dataset(folder: Path, shards: int, images: int, seed: int = 0) -> Path:
    """A folder as img2dataset leaves it, with pictures of noise; a tenth of each shard is broken."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(seed)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(images):
                key = f"{shard:05d}{number:04d}"
                buffer = io.BytesIO()
                small = Image.fromarray(noise.integers(0, 256, (30, 40, 3), dtype=np.uint8))
                small.resize((160, 120)).save(buffer, "JPEG")
                image = buffer.getvalue() if number % 10 else b"broken"
                metadata = json.dumps({"key": key, "caption": f"noise {key}", "status": "success"}).encode()
                for extension, data in (("jpg", image), ("txt", f"noise {key}".encode()), ("json", metadata)):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        stats = {"count": images, "successes": images, "failed_to_download": 0, "failed_to_resize": 0}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return folder


@pytest.fixture(scope="session")
def downloads(tmp_path_factory) -> Path:
    """Twelve shards of ten images; do not change them."""
    return write_img2dataset(tmp_path_factory.mktemp("source") / "downloads", 12, 10)


@pytest.fixture
def many_downloads(tmp_path) -> Path:
    """Forty shards of forty images."""
    return write_img2dataset(tmp_path / "source" / "downloads", 40, 40)


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """Starts `data-prep` with these arguments in a process of its own."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        program = "import sys; from data_prep.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", program, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def files() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder, by its name from there."""
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
