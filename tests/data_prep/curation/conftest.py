"""Fixtures: data sets of images and of texts, made from plain Python values."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from data_prep.cli import main
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image


def text(words: str, language: str = "en", role: str = "name") -> dict:
    return {"text": words, "language": language, "origin": "human", "role": role}


def photo(seed: int, size: int = 64) -> Image.Image:
    """Something with the low frequencies of a photo: smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., str]:
    """write_images(name, [(png bytes, [TEXT, …]), …]) → folder of a data set with three images a shard."""

    def write(name: str, samples: Sequence[tuple[bytes, list[dict]]], kind: str = "image-short") -> str:
        with DatasetWriter(tmp_path / name, kind=kind, source="made", samples_per_shard=3) as writer:
            for number, (data, captions) in enumerate(samples):
                fields = {"captions": captions, "source": "made", "item": f"item-{number}"}
                languages = sorted({caption["language"] for caption in captions})
                members = {"png": data, "json": json.dumps(fields, ensure_ascii=False).encode()}
                writer.write(f"{name}-{number}", members, languages=languages, tokens=None)
        return str(tmp_path / name)

    return write


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., str]:
    """write_pairs(name, [(query, target), …]) → folder of a data set of text pairs, three a shard."""

    def write(name: str, samples: Sequence[tuple[str | list[dict], str | list[dict]]]) -> str:
        with DatasetWriter(tmp_path / name, kind="text-pairs", source="made", samples_per_shard=3) as writer:
            for number, sides in enumerate(samples):
                query, target = ([text(side)] if isinstance(side, str) else side for side in sides)
                fields = {"query": query, "target": target, "source": "made", "item": f"item-{number}"}
                languages = sorted({one["language"] for one in [*query, *target]})
                members = {"json": json.dumps(fields, ensure_ascii=False).encode()}
                writer.write(f"{name}-{number}", members, languages=languages, tokens=7)
        return str(tmp_path / name)

    return write


def keys(folder: Path) -> list[str]:
    dataset = Dataset.open(folder, verify=True)
    return [dataset.row(number).key for number in range(len(dataset))]


def contents(folder: Path) -> list[dict]:
    dataset = Dataset.open(folder)
    return [json.loads(dataset.read(number)["json"]) for number in range(len(dataset))]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; two that are equal hold the same bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def receipt(folder: Path) -> dict:
    return json.loads((folder / "receipt.json").read_text())


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0
