"""Zero-shot classification by CLIP_benchmark's protocol, with class names in any language.

A set is a folder with `classnames.txt`, one name a line, and images: folders of them, whose sorted order is that of the
names, or webdataset tars whose samples have an image and `.cls`, the number of the name from 0 (LAION's `wds_*` sets;
tars of a folder `train` are left out). `zeroshot_classification_templates.txt` has sentences with `{c}` for the name; a
class is the mean of their normalised vectors. `classnames.de.txt`, `zeroshot_classification_templates.de.txt` are the
same in German; a language without templates has the names alone.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from data_prep.shards import ShardError
from vision_tower.preprocess import check_image

from stage_trainer.data.samples import IMAGE_TYPES, shard_errors_explained
from stage_trainer.errors import UserError
from stage_trainer.evaluation.measured import Figures, Measured
from stage_trainer.evaluation.models import Embedder
from stage_trainer.evaluation.sets import CLASS_NAMES, EvalSet
from stage_trainer.metrics.ranking import best
from stage_trainer.metrics.retrieval import unit
from stage_trainer.recipe.limits import MAX_PIXELS

FIRST, FIVE, BY_CLASS = "accuracy", "accuracy among the first five", "mean accuracy of the classes"
TEMPLATES = "zeroshot_classification_templates"
_AT_ONCE = 256  # read and embedded at a time

Labelled = tuple[bytes, int, str]
"""An encoded image, the number of its class, and its name for messages."""


@shard_errors_explained()
def measure(model: Embedder, known: EvalSet, folder: Path, max_pixels: int = MAX_PIXELS) -> Measured:
    """The share of images whose class is the first, and among the first five, in each language and at every dim.

    Raises:
        UserError: names, templates or images are missing or do not fit each other; the embeddings say nothing.
    """
    names = {language: _lines(path) for language, path in _class_files(folder).items()}
    counts = {language: len(of) for language, of in names.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"{folder} has different numbers of class names: {counts}; expected as many in each language")
    classes = next(iter(counts.values()))
    labels: list[int] = []
    pictures = model.embed_image_batches(_images(_labelled(folder, classes), labels, classes, max_pixels))
    if not labels:
        raise UserError(f"{folder} has class names and no images: neither tars nor folders of {', '.join(IMAGE_TYPES)}")
    right = np.array(labels)
    figures: Figures = {}
    for language, of in names.items():
        templates = _templates(folder, language)
        texts = [template.replace("{c}", name) for name in of for template in templates]
        vectors = model.embed_texts(texts).reshape(classes, len(templates), -1)
        for dim in model.dims:
            of_classes = np.stack([unit(each[:, :dim]).mean(axis=0) for each in vectors])
            found = best(unit(pictures[:, :dim]), unit(of_classes), min(5, classes)) == right[:, None]
            recalls = [found[right == label, 0].mean() for label in sorted(set(labels))]
            values = (found[:, 0].mean(), found.any(axis=1).mean(), np.mean(recalls))
            for measure_, value in zip((FIRST, FIVE, BY_CLASS), values, strict=True):
                figures.setdefault(measure_, {}).setdefault(language, {})[str(dim)] = float(value)
    empty = classes - len(set(labels))
    notes = (f"{known.name} has {empty} classes without an image",) if empty else ()
    return Measured(figures, {"images": len(labels), "classes": classes, "languages": len(names)}, notes)


def languages_of(folder: Path) -> tuple[str, ...]:
    """The languages of a set's class names."""
    return tuple(_class_files(folder))


def _class_files(folder: Path) -> dict[str, Path]:
    """classnames.txt, which is English, and classnames.LANGUAGE.txt, by language."""
    more = sorted(folder.glob(CLASS_NAMES.replace(".txt", ".*.txt")))
    return {"en": folder / CLASS_NAMES, **{path.name.split(".")[1]: path for path in more}}


def _templates(folder: Path, language: str) -> list[str]:
    names = [f"{TEMPLATES}.{language}.txt", *([f"{TEMPLATES}.txt"] if language == "en" else [])]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return ["{c}"]
    templates = _lines(path)
    if odd := [template for template in templates if "{c}" not in template]:
        raise UserError(f"{path}: {odd[0]!r:.80} has no {{c}} for the class's name")
    return templates


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not all(lines):
        raise UserError(f"{path}: line {lines.index('') + 1} is empty; expected one name or sentence a line")
    return lines


def _images(images: Iterator[Labelled], labels: list[int], classes: int, max_pixels: int) -> Iterator[list[bytes]]:
    """The images in parts; their classes are appended to `labels`."""
    while part := list(islice(images, _AT_ONCE)):
        for image, label, name in part:
            check_image(image, max_pixels=max_pixels, name=name)
            if not 0 <= label < classes:
                raise UserError(f"{name} is of class {label}; there are {classes} class names, from 0")
            labels.append(label)
        yield [image for image, _, _ in part]


def _labelled(folder: Path, classes: int) -> Iterator[Labelled]:
    if tars := sorted(path for path in folder.rglob("*.tar") if "train" not in path.relative_to(folder).parts):
        for tar in tars:
            yield from _of_tar(tar)
        return
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) != classes:
        raise UserError(f"{folder} has {len(folders)} folders and {classes} class names; expected one for each")
    for label, place in enumerate(folders):
        for path in sorted(place.rglob("*")):
            if path.suffix.lower().removeprefix(".") in IMAGE_TYPES:
                yield path.read_bytes(), label, str(path)


def _of_tar(tar: Path) -> Iterator[Labelled]:
    """The samples of a webdataset tar, whose members follow each other."""
    try:
        with tarfile.open(tar, "r:") as archive:
            key, sample = "", dict[str, bytes]()
            for member in archive:
                if member.isfile():
                    own, _, extension = member.name.partition(".")
                    if own != key:
                        yield from _sample(tar, key, sample)
                        key, sample = own, {}
                    sample[extension.lower()] = archive.extractfile(member).read()  # type: ignore[union-attr]
            yield from _sample(tar, key, sample)
    except (OSError, tarfile.TarError) as error:
        raise ShardError(f"{tar} cannot be read ({error})") from error


def _sample(tar: Path, key: str, sample: dict[str, bytes]) -> Iterator[Labelled]:
    if not sample:
        return
    image = next((sample[kind] for kind in IMAGE_TYPES if kind in sample), None)
    try:
        label = int(sample.get("cls", b"").decode())
    except ValueError:
        label = None
    if image is None or label is None:
        raise ShardError(
            f"{tar}: sample {key!r} has {', '.join(sorted(sample))}; expected an image and its class in .cls"
        )
    yield image, label, f"{tar}, sample {key}"
