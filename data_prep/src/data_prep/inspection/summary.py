"""Summarises a data set: counts from all sidecars; lengths, sizes and examples from evenly spaced samples."""

from __future__ import annotations

import base64
import hashlib
import io
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.shards import Dataset, ShardError, content_of, texts_in
from data_prep.shards.files import read_object
from data_prep.shards.format import IMAGE_TYPES

_THUMBNAIL = 168  # pixels
_MOST = 2**26  # pixels of an image for which a thumbnail is made


@dataclass
class Example:
    """A sample to show: its key, a thumbnail as a data URL if it has an image, its texts (language, role, text)."""

    key: str
    picture: str | None
    texts: list[tuple[str, str, str]]


@dataclass
class Summary:
    """One data set. Figures that need samples to be read are over the `sampled` ones, which are evenly spaced."""

    name: str
    kind: str
    samples: int
    shards: int
    size: int
    sampled: int = 0
    by_language: Counter[str] = field(default_factory=Counter)
    by_origin: Counter[str] = field(default_factory=Counter)
    tokens: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # characters of each text
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    same_samples: int = 0
    same_images: int = 0
    same_texts: int = 0
    unreadable: list[str] = field(default_factory=list)
    dropped: list[tuple[str, int, str]] = field(default_factory=list)  # reason, count, examples


def sampled(samples: int, look_at: int) -> range:
    """The numbers of the samples to read: at most `look_at`, evenly spaced."""
    return range(0, samples, max(1, ceil(samples / look_at)))


def summarize(directory: Path, *, look_at: int, examples: int, tick: Callable[[], None] = lambda: None) -> Summary:
    """Summarise a data set.

    Args:
        look_at: samples to read at most; examples: to show for each language at most.
        tick: called for each line of a sidecar, and again for each sample that is read.

    Raises:
        ShardError: the data set is not whole.
    """
    dataset = Dataset.open(directory)
    found = Summary(
        "/".join(directory.absolute().parts[-3:]),  # split, kind and source, as the folders are laid out
        dataset.kind,
        len(dataset),
        len(dataset.shards),
        sum(dataset.shards["bytes"].tolist()),
    )
    _read_sidecars(dataset, found, tick)
    _read_samples(dataset, found, look_at, examples, tick)
    found.dropped = _dropped(directory / "receipt.json")
    return found


def _dropped(receipt: Path) -> list[tuple[str, int, str]]:
    """(reason, count, examples) of what the import dropped; nothing without a receipt. ShardError if it is none."""
    if not receipt.exists():
        return []
    try:
        content = read_object(receipt)
        examples = content.get("examples", {})
        counts = [(reason, operator.index(count)) for reason, count in content.get("dropped", {}).items()]
        return [(reason, count, ", ".join(examples.get(reason, ()))) for reason, count in counts]
    except (AttributeError, TypeError, ValueError) as error:
        raise ShardError(f"{receipt}: not a receipt of an import ({error}); remove it, or import again") from error


def _read_sidecars(dataset: Dataset, found: Summary, tick: Callable[[], None]) -> None:
    hashes = np.empty(len(dataset), dtype=np.uint64)  # 64 of the 256 bits: enough to count equal samples
    for index in range(len(dataset)):
        tick()
        row = dataset.row(index)
        hashes[index] = int(row.sha256[:16], 16)
        found.by_language.update(row.languages)
        if row.tokens is not None:
            found.tokens.append(row.tokens)
    found.same_samples = len(hashes) - len(np.unique(hashes))


def _read_samples(dataset: Dataset, found: Summary, look_at: int, examples: int, tick: Callable[[], None]) -> None:
    images: Counter[bytes] = Counter()
    texts: Counter[bytes] = Counter()
    for index in sampled(len(dataset), look_at):
        tick()
        key = dataset.row(index).key
        try:
            members = dataset.read(index)
            own = _texts(dataset.kind, members)
            extension = next((name for name in IMAGE_TYPES if name in members), None)
            image = _open(members[extension]) if extension else None
        except (ValueError, OSError) as error:  # ShardError is a ValueError
            found.unreadable.append(f"{key}: {error}")
            continue
        found.sampled += 1
        found.lengths += [len(text) for _, _, text, _ in own]
        found.by_origin.update(origin for _, _, _, origin in own)
        texts.update({_digest("\0".join(text for _, _, text, _ in own).encode())})
        if image is not None and extension:
            found.sizes[image.size] += 1
            images[_digest(members[extension])] += 1
        for language in {language for language, *_ in own}:
            shown = found.examples.setdefault(language, [])
            if len(shown) < examples:
                in_language = [(of, role, text) for of, role, text, _ in own if of == language]
                shown.append(Example(key, _thumbnail(image) if image is not None else None, in_language))
    found.same_images = images.total() - len(images)
    found.same_texts = texts.total() - len(texts)


def _texts(kind: str, members: dict[str, bytes]) -> list[tuple[str, str, str, str]]:
    """(language, role, text, origin) of every text of a sample; those of a pair with their side in the role."""
    found = []
    negatives = 0
    for part, texts in texts_in(kind, content_of(kind, members)):
        negatives += part == "negatives"
        named = f"negative {negatives}" if part == "negatives" else part
        for text in texts:
            role = text.get("role", "caption") if part == "captions" else named
            found.append((text["language"], role, text["text"], text.get("origin", "unknown")))
    return found


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(str(error)) from error


def _thumbnail(image: Image.Image) -> str | None:
    """A thumbnail as a data URL; None if the image cannot be decoded."""
    if image.width * image.height > _MOST:
        return None
    try:
        image.thumbnail((2 * _THUMBNAIL, 2 * _THUMBNAIL))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=80)
    except Exception:  # Pillow's readers raise all kinds of exceptions; `validate` reports them
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
