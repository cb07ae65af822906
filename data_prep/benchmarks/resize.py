"""Resizing and packing JPEGs: `data-prep import images`, a plain process pool, and img2dataset's resizer in one.

python benchmarks/resize.py [--images 5000] [--img2dataset PYTHON]

The images are web-sized (6 in 10 of 640 × 480, 3 of 1024 × 768, 1 of 1600 × 1200), 200 different ones that come
again and again; all contenders bring the shortest side to 384, encode at quality 95 and write tars of 500. The pool
does with Pillow what we do (`draft`, the Hamming kernel) and writes tars with the standard library: no table, checks,
hashes, sidecars or fsync. img2dataset needs an environment of its own; PYTHON is its interpreter.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median

SIZES = ((640, 480),) * 6 + ((1024, 768),) * 3 + ((1600, 1200),)
DIFFERENT = 200
SIDE = 384
CHUNK = 500  # as many rows as a unit of ours has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--img2dataset", metavar="PYTHON", help="interpreter that has img2dataset")
    parser.add_argument("--scratch", default=None, help="where images and shards go; images there are used again")
    parser.add_argument("--peer", nargs=3, metavar=("LIST", "OUT", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(*img2dataset_seconds(Path(options.peer[0]), Path(options.peer[1]), int(options.peer[2])))
        return
    from common import machine, write

    contenders = ["process pool", *["img2dataset's resizer"] * bool(options.img2dataset), "data_prep"]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(options.scratch or temporary)
        names = draw(root / "images", options.images)
        for repeat in range(options.repeats):
            for name in contenders[repeat % len(contenders) :] + contenders[: repeat % len(contenders)]:
                out = root / "out"
                wall, spent = run(name, root / "images", names, out, options)
                seconds[name].append(wall)
                processor[name].append(spent)
                size = sum(path.stat().st_size for path in out.rglob("*.tar"))
                print(f"{name}: {wall:.1f} s, {spent:.1f} s of processor time, {size / 1e6:.0f} MB")
                shutil.rmtree(out)
    results = {
        name: {
            "seconds": median(found),
            "images_per_second": options.images / median(found),
            "ours_takes": median(seconds["data_prep"]) / median(found),
            "processor_seconds": median(processor[name]),
            "ours_takes_of_processor": median(processor["data_prep"]) / median(processor[name]),
        }
        for name, found in seconds.items()
    }
    settings = {"images": options.images, "workers": options.workers, "repeats": options.repeats, "side": SIDE}
    about = machine("pillow")
    if options.img2dataset:
        asked = "from importlib.metadata import version as v; print(v('img2dataset'), v('opencv-python-headless'))"
        told = subprocess.run([options.img2dataset, "-c", asked], capture_output=True, text=True, check=True).stdout
        about["versions"] |= dict(zip(("img2dataset", "opencv"), told.split(), strict=True))
    for name, found in results.items():
        rate = f"{found['seconds']:8.1f} s{found['images_per_second']:8.0f}/s"
        ratios = f"{found['ours_takes']:.2f} of it, {found['ours_takes_of_processor']:.2f} of its processor time"
        print(f"{name:24s}{rate}   ours takes {ratios}")
    write("resize", about, settings, results)


def draw(folder: Path, count: int) -> list[str]:
    """Write the different images and a table of `count` rows; gives the rows' file names."""
    import numpy as np
    from PIL import Image

    names = [f"{number % DIFFERENT}.jpg" for number in range(count)]
    folder.mkdir(exist_ok=True, parents=True)
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((name, f"caption of {name}") for name in names)])
    if all((folder / name).exists() for name in names):
        return names
    noise = np.random.default_rng(0)
    for number in range(min(DIFFERENT, count)):
        size = SIZES[number % len(SIZES)]
        layers = [
            np.asarray(
                Image.fromarray(noise.integers(0, 256, (*grid, 3), dtype=np.uint8)).resize(size), dtype=np.float32
            )
            for grid in ((6, 8), (48, 64), (240, 320))
        ]
        image = 0.6 * layers[0] + 0.3 * layers[1] + 0.1 * layers[2]
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    return names


def run(name: str, images: Path, names: list[str], out: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds from the files to the tars, and processor seconds of all processes, the start of the workers included."""
    began, spent = time.perf_counter(), processor_seconds()
    if name == "data_prep":
        from data_prep.execute import Execution, Target
        from data_prep.image_rule import ImageRule
        from data_prep.sources.folder import Folder
        from data_prep.sources.importing import import_source

        import_source(
            Folder(str(images)),
            Target(str(out), "images"),
            title="images",
            image=ImageRule(SIDE),
            execution=Execution(workers=options.workers),
            log=lambda line: None,
        )
    elif name == "process pool":
        out.mkdir()
        chunks = [(images, names[first : first + CHUNK], out / f"{first}.tar") for first in range(0, len(names), CHUNK)]
        pool = multiprocessing.Pool(options.workers)
        pool.starmap(pool_chunk, chunks, chunksize=1)
        pool.close()
        pool.join()
    else:
        listed = images.parent / "names.json"
        listed.write_text(json.dumps([str(images / one) for one in names]))
        command = [options.img2dataset, __file__, "--peer", str(listed), str(out), str(options.workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        wall, peer = done.stdout.split()[-2:]  # it loads a lot before it starts: that is left out
        return float(wall), float(peer)
    return time.perf_counter() - began, processor_seconds() - spent


def processor_seconds() -> float:
    """Of this process and of those that it waited for: a busy machine hardly changes them."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def pool_chunk(images: Path, names: list[str], tar: Path) -> None:
    """A chunk of the plain pool."""
    from PIL import Image

    with tarfile.open(tar, "w") as file:
        for number, name in enumerate(names):
            with Image.open(images / name, formats=("JPEG",)) as image:
                scale = SIDE / min(image.size)
                target = round(image.width * scale), round(image.height * scale)
                image.draft("RGB", target)
                buffer = io.BytesIO()
                plain = image if image.mode == "RGB" else image.convert("RGB")  # which copies what is RGB already
                plain.resize(target, Image.Resampling.HAMMING).save(buffer, "JPEG", quality=95)
            add(file, f"{number}.jpg", buffer.getvalue())
            add(file, f"{number}.txt", f"caption of {name}".encode())


def img2dataset_seconds(listed: Path, out: Path, workers: int) -> tuple[float, float]:
    """The pool with img2dataset's resizer in it, in its own interpreter."""
    names = json.loads(listed.read_text())
    out.mkdir()
    chunks = [(names[first : first + CHUNK], str(out / f"{first}.tar")) for first in range(0, len(names), CHUNK)]
    import img2dataset.resizer  # noqa: F401 - loaded before the clock starts, and inherited by the workers

    began, spent = time.perf_counter(), processor_seconds()
    pool = multiprocessing.get_context("fork").Pool(workers)
    pool.starmap(img2dataset_chunk, chunks, chunksize=1)
    pool.close()
    pool.join()
    return time.perf_counter() - began, processor_seconds() - spent


def img2dataset_chunk(names: list[str], tar: str) -> None:
    from img2dataset.resizer import Resizer

    resizer = Resizer(image_size=SIDE, resize_mode="keep_ratio", resize_only_if_bigger=True, encode_quality=95)
    with tarfile.open(tar, "w") as file:
        for number, name in enumerate(names):
            image, *_, error = resizer(io.BytesIO(Path(name).read_bytes()))
            if error is not None:
                sys.exit(f"{name}: {error}")
            add(file, f"{number}.jpg", image)
            add(file, f"{number}.txt", f"caption of {Path(name).name}".encode())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    main()
