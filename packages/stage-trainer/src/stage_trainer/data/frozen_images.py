"""Images of which only the embeddings are read: those of an image tower that does not train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from data_prep.shards import Dataset
from vision_tower import ImageError, VisionTowerConfig, augment, preprocess

from stage_trainer.data.samples import texts_of
from stage_trainer.data.stateless_rng import key
from stage_trainer.data.stored_vectors import StoredVectors
from stage_trainer.data.streamed import StreamedShards
from stage_trainer.recipe import AugmentationConfig


def inference_of(tower: VisionTowerConfig) -> dict[str, Any]:
    """How a tower's images are brought to their size, as options of `vision_tower.preprocess`."""
    return {name: getattr(tower, name) for name in ("crop_pct", "crop_mode", "interpolation")} | {"fill": tower.mean}


def view(
    image: torch.Tensor, size: int, a: AugmentationConfig, seed: int, number: int, inference: Mapping[str, Any]
) -> torch.Tensor:
    """One of the fixed views of an image (`augmentation.views`), uint8 `[3, R, R]`: the first is the image as in
    inference, the others are augmented.

    Args:
        seed: the image's, the same at every draw.
        inference: `inference_of` the tower.
    """
    if number == 0:
        return preprocess(image, size, **inference)
    seed = key(seed, "fixed view", number)
    return augment(image, seed, size, scale=a.scale, ratio=a.ratio, flip=a.flip, color=a.color)


def view_seed(seed: int, data: Dataset | StreamedShards, index: int) -> int:
    """Of an image's fixed views, from the stage's seed."""
    return key(seed, data.kind, data.source, index, "views")


class FrozenImages:
    """The stored embeddings of a stage's data sets of images, in the place of their pixels.

    Args:
        folder: of the stored vectors.
        sources: the data sets.
        origin: what determines the vectors beside the data (`origin_of`).
    """

    def __init__(self, folder: Path, sources: list[Dataset], origin: Mapping[str, object]):
        self.stores = {data.directory: StoredVectors(folder, data, origin) for data in sources}

    def sample(self, data: Dataset, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """(embeddings of its views, float32 `[V, D]`; the texts) of a sample; errors as `SampleCache.sample`."""
        members = data.read(index)
        found = self.stores[data.directory].of(index)
        if isinstance(found, str):
            raise ImageError(found)
        return found, texts_of(data, index, members)


def origin_of(
    weights: str, resolution: int, precision: str, augmentation: AugmentationConfig, seed: int
) -> dict[str, object]:
    """What determines the embeddings of images: the tower (`digest_of`), and which pixels it gets."""
    views = augmentation.views
    drawn: dict[str, object] = {"augmentation": asdict(augmentation), "seed": seed} if views > 1 else {}
    return {"weights": weights, "resolution": resolution, "precision": precision, "views": views, **drawn}
