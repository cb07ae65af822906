"""The same samples through our tar writer and through webdataset's: speed, bytes, offsets.

python benchmarks/tar_writers.py [--samples 3000] [--repeats 7]

`shard` is what an import writes: the tar, its hash, the offset of each member, a hash of each sample, the sidecar,
flushed to the disk; only the class that writes the tar differs. `tar` is the tar alone. Images are noise, as large as
JPEGs of 256 × 256 (15 kB), 384 × 384 (35 kB) and 768 × 768 (120 kB), beside a .json of 300 bytes.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common import machine, write
from data_prep.shards import ShardWriter
from data_prep.shards import writer as shard_writer
from data_prep.shards.files import TarFile, temporary
from webdataset import TarWriter

SIZES = (15_000, 35_000, 120_000)
SHARD = 1000


class ByWebdataset:
    """What `TarFile` does, with webdataset's writer: its settings are those that give the same bytes each time."""

    def __init__(self, path: Path) -> None:
        self.path, self._temporary = path, temporary(path)
        self._file = self._temporary.open("wb")
        self._digest, self._size = hashlib.sha256(), 0
        self._tar = TarWriter(self, encoder=False, mtime=0, user="", group="")

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._size += len(data)
        return self._file.write(data)

    def add(self, name: str, data: bytes) -> list[int]:
        before = self._tar.tarstream.offset
        key, _, extension = name.partition(".")
        self._tar.write({"__key__": key, extension: data})
        return [before + tarfile.BLOCKSIZE, len(data)]

    def finish(self) -> tuple[int, str]:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self.path)
        return self._size, self._digest.hexdigest()

    def abandon(self) -> None:
        self._file.close()
        self._temporary.unlink()


def samples(size: int, count: int) -> list[tuple[str, dict[str, bytes]]]:
    """Keys and members, of fifty different images."""
    draw = random.Random(size)
    images = [draw.randbytes(size) for _ in range(50)]
    text = ('{"captions": [{"text": "' + "x" * 230 + '"}], "source": "web", "item": "0"}').encode()
    return [(f"00000-{number:06d}", {"jpg": images[number % 50], "json": text}) for number in range(count)]


def shard(folder: Path, found: list[tuple[str, dict[str, bytes]]], tar: type[TarFile | ByWebdataset]) -> None:
    vars(shard_writer)["TarFile"] = tar
    for first in range(0, len(found), SHARD):
        one = ShardWriter(folder / f"{first}.tar", "image-short")
        for key, members in found[first : first + SHARD]:
            one.write(key, members, languages=["en"], tokens=None)
        one.finish()


def ours(folder: Path, found: list[tuple[str, dict[str, bytes]]]) -> None:
    shard(folder, found, TarFile)


def with_webdataset(folder: Path, found: list[tuple[str, dict[str, bytes]]]) -> None:
    shard(folder, found, ByWebdataset)


def webdataset_alone(folder: Path, found: list[tuple[str, dict[str, bytes]]]) -> None:
    for first in range(0, len(found), SHARD):
        with TarWriter(str(folder / f"{first}.tar"), encoder=False, mtime=0) as tar:
            for key, members in found[first : first + SHARD]:
                tar.write({"__key__": key, **members})


CONTENDERS: dict[str, Callable[[Path, Any], None]] = {
    "shard, ours": ours,
    "shard, webdataset": with_webdataset,
    "tar, webdataset": webdataset_alone,
}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def measure(scratch: Path, size: int, options: argparse.Namespace) -> dict[str, Any]:
    found = samples(size, options.samples)
    spent: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    written: dict[str, list[dict[str, str]]] = {name: [] for name in CONTENDERS}
    for repeat in range(options.repeats):
        for name in [*CONTENDERS][repeat % 3 :] + [*CONTENDERS][: repeat % 3]:
            folder = scratch / f"{name}-{size}-{repeat}"
            folder.mkdir()
            begun = time.process_time()
            CONTENDERS[name](folder, found)
            spent[name].append(time.process_time() - begun)
            written[name].append(hashes(folder))
            subprocess.run(["rm", "-r", str(folder)], check=True)
    microseconds = {name: 1e6 * median(times) / options.samples for name, times in spent.items()}
    alike = {f"{name}: the same bytes each time": all(one == all_[0] for one in all_) for name, all_ in written.items()}
    same = written["shard, ours"][0] == written["shard, webdataset"][0]
    ratio = microseconds["shard, webdataset"] / microseconds["shard, ours"]
    shown = ", ".join(f"{name} {value:.0f}" for name, value in microseconds.items())
    print(f"{size:>8,} bytes, µs a sample: {shown}; webdataset takes {ratio:.2f} times as long; same bytes: {same}")
    return {
        "microseconds_a_sample": microseconds,
        "webdataset_to_ours": ratio,
        "ours_and_webdataset_the_same_bytes_and_offsets": same,
        **alike,
    }


def import_seconds(module: str) -> float:
    """Processor seconds of importing a module in a fresh process, less those of an empty one."""

    def once(code: str) -> float:
        program = f"import time; {code}; print(time.process_time())"
        return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)

    return median(once(f"import {module}") for _ in range(3)) - median(once("pass") for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scratch", default=None, help="where the shards go (default: the system's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        results = {f"{size} bytes": measure(Path(scratch), size, options) for size in SIZES}
    results["import_seconds"] = {name: import_seconds(name) for name in ("data_prep.shards", "webdataset")}
    print(results["import_seconds"])
    settings = {"samples": options.samples, "repeats": options.repeats, "sizes": SIZES, "samples_per_shard": SHARD}
    write("tar_writers", machine("webdataset"), settings, results)


if __name__ == "__main__":
    main()
