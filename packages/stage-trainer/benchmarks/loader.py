"""What one worker that loads data does in a second: images read, decoded, augmented and their captions tokenised, ours
beside webdataset with open_clip's transform, on the same shards.

    data-prep corpus runs/corpus-drawn --drawn
    python packages/stage-trainer/benchmarks/loader.py --corpus runs/corpus-drawn     # a minute

Both run in this process, on one thread, in turn, and count with their fastest round, in processor time. Crops have the
same areas and shapes, and captions the drawn corpus's tokenizer. What a worker sends to the trainer is not counted:
theirs are four bytes a value, ours one.

The images are JPEGs (quality 90) cut out of scikit-learn's two photographs, which are mirrored to fill them. With them
are measured how far training's pixels are from Pillow's, and how far those of JPEGs decoded at half their size are.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import common
import numpy as np
import open_clip
import webdataset
from data_prep.shards import DatasetWriter
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images
from stage_trainer.build import load_tokenizer
from stage_trainer.data.batches import StageBatches
from vision_tower import augment, load_pixels
from vision_tower.augment import _crop

RESOLUTION, SCALE, RATIO = 224, (0.9, 1.0), (3 / 4, 4 / 3)  # as open_clip has them
CAPTION = "a photograph of a building or of a flower, number {}, as somebody might have described it in one line"


def main() -> None:
    parser = common.parser(__doc__, "loader")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if options.small:
        options.repeats = 1
    common.start()
    sizes = {"384 x 384": (384, 384, 64), "2000 x 1500": (2000, 1500, 16)}
    results: dict[str, Any] = {}
    for name, (width, height, count) in sizes.items():
        files = [jpeg(photo(width, height, n)) for n in range(2 if options.small else count)]
        with TemporaryDirectory() as folder:
            results[name] = {
                "bytes_of_an_image": sum(map(len, files)) // len(files),
                "images_per_second": compared(options, Path(folder), files),
                "levels_from_pillows": from_pillows(files),
            }
        found = results[name]["images_per_second"]
        for ours in ("ours", "ours, without simplejpeg"):
            results[name][f"times_webdataset: {ours}"] = found[ours] / found["webdataset, open_clip"]
    photos = [jpeg(photo(2000, 1500, n)) for n in range(2)]
    results["at_half_the_size"] = {"photographs": at_half(photos), "text": at_half([jpeg(page(2000, 1500))])}
    settings = {"resolution": RESOLUTION, "scale": SCALE, "ratio": RATIO, "quality": 90, "rounds": options.repeats}
    common.write(options.results, settings, results)


def photo(width: int, height: int, seed: int) -> Image.Image:
    """A part of a photograph, mirrored where it ends."""
    whole = load_sample_images().images[seed % 2]
    draw = random.Random(seed)
    top, left = draw.randrange(whole.shape[0] // 2), draw.randrange(whole.shape[1] // 2)
    missing = [(0, max(0, top + height - whole.shape[0])), (0, max(0, left + width - whole.shape[1])), (0, 0)]
    return Image.fromarray(np.pad(whole, missing, mode="symmetric")[top : top + height, left : left + width])


def page(width: int, height: int) -> Image.Image:
    """Lines of text in colours."""
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=22)
    for y in range(0, height, 26):
        draw.text((10, y), CAPTION.format(y) * 3, fill=(y % 200, 20, 80), font=font)
    return image


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def compared(options: argparse.Namespace, folder: Path, files: list[bytes]) -> dict[str, float]:
    """Images a second of each way."""
    out = folder / "train" / "image-short" / "made"
    with DatasetWriter(out, kind="image-short", source="made") as writer:
        for number, data in enumerate(files):
            content = {"captions": [{"text": CAPTION.format(number), "language": "en"}]}
            members = {"jpg": data, "json": json.dumps(content).encode()}
            writer.write(f"s{number}", members, languages=["en"], tokens=None)
    recipe = common.recipe_of(
        argparse.Namespace(small=True, corpus=options.corpus),
        f"corpus={folder}",
        "data={image_text: [{path: image-short/made}]}",
        f"batch={{image_text: {len(files)}, text: 0}}",
        "cache_megabytes=0",
        f"resolution=[[0, {RESOLUTION}]]",
        f"augmentation={{scale: {list(SCALE)}, ratio: {list(RATIO)}}}",
    )
    tokenizer = load_tokenizer(recipe)
    transform = open_clip.image_transform(RESOLUTION, is_train=True, mean=None, std=None, aug_cfg={"scale": SCALE})

    def theirs() -> Any:
        read = webdataset.WebDataset([str(p) for p in sorted(out.glob("*.tar"))], shardshuffle=False)
        pairs = read.decode("pilrgb").to_tuple("jpg", "json")
        texts = pairs.map_tuple(transform, lambda of: tokenizer([of["captions"][0]["text"]], max_length=77)[0])
        return next(iter(texts.batched(len(files), collation_fn=lambda samples: samples)))

    batches, steps = common.data_of(recipe), itertools.count()
    ways = {
        "webdataset, open_clip": theirs,
        "ours": lambda: of_step(batches, steps),
        "ours, without simplejpeg": lambda: without_simplejpeg(lambda: of_step(batches, steps)),
    }
    assert len(theirs()) == len(files)
    return {name: len(files) / took for name, took in fastest(ways, options.repeats).items()}


def of_step(batches: StageBatches, steps: Iterator[int]) -> None:
    step = next(steps)
    pieces = [batches.piece(step, number) for number in range(batches.pieces(step))]
    assert not any(piece.images.drawn.corrupt for piece in pieces)


def without_simplejpeg(run: Callable[[], None]) -> None:
    with mock.patch.object(sys.modules[load_pixels.__module__], "_simplejpeg", return_value=None):
        run()


def fastest(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of processor time of each, the least of the rounds after a first that does not count."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(repeats + 1):
        for name, run in ways.items():
            began = time.process_time()
            run()
            if turn:
                best[name] = min(best[name], time.process_time() - began)
    return best


def from_pillows(files: list[bytes]) -> dict[str, float]:
    """Shares of the values of training's crops that are so many levels from Pillow's of the same crops."""
    found = []
    for seed, data in enumerate(files):
        image = Image.open(io.BytesIO(data))
        top, left, rows, columns = _crop(random.Random(seed), (image.height, image.width), 1.0, SCALE, RATIO)
        crop = image.crop((left, top, left + columns, top + rows))
        theirs = np.asarray(crop.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC))
        ours = augment(load_pixels(data), seed, RESOLUTION, scale=SCALE, ratio=RATIO).permute(1, 2, 0).numpy()
        found.append(np.abs(ours.astype(int) - theirs))
    return levels(np.stack(found))


def at_half(files: list[bytes]) -> dict[str, float]:
    """The same of whole images decoded by libjpeg at half their size, from those decoded at all of it."""
    found = []
    for data in files:
        small, whole = (Image.open(io.BytesIO(data)) for _ in range(2))
        small.draft("RGB", (small.width // 2, small.height // 2))
        assert 2 * small.width == whole.width
        size = RESOLUTION * whole.width // whole.height, RESOLUTION
        pixels = [np.asarray(of.resize(size, Image.Resampling.BICUBIC)).astype(int) for of in (small, whole)]
        found.append(np.abs(pixels[0] - pixels[1]))
    return levels(np.stack(found))


def levels(difference: np.ndarray) -> dict[str, float]:
    return {
        "one": float((difference == 1).mean()),
        "two": float((difference == 2).mean()),
        "more": float((difference > 2).mean()),
        "most": int(difference.max()),
    }


if __name__ == "__main__":
    main()
