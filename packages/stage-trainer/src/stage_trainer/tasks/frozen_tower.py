"""Runs an image tower that does not train over a stage's images, once, and keeps what it gives on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from data_prep.shards import Dataset, ShardError, ShardUnavailable
from vision_tower import ImageError, VisionTower
from vision_tower.projector import without_projector

from stage_trainer.data.batches import StageBatches
from stage_trainer.data.frozen_images import FrozenImages, origin_of, view, view_seed
from stage_trainer.data.samples import SampleCache
from stage_trainer.data.stored_vectors import StoredVectors, digest_of
from stage_trainer.errors import UserError
from stage_trainer.recipe import Stage

CHUNK = 64
"""Images of one forward pass."""
_OF_NO_INFLUENCE = ("resolution", "checkpointing", "attention", "compile", "projector", "projector_hidden")
Phase = Callable[[], AbstractContextManager[object]]
"""Entered for each pass: what is not stuck may take long."""


@dataclass(frozen=True)
class Pass:
    """How the tower computes: the resolution that is set, the run's precision, and where."""

    resolution: int
    precision: str
    device: torch.device


def keep_embeddings(tower: VisionTower, batches: StageBatches, stage: Stage, how: Pass, phase: Phase) -> None:
    """Gives batches the tower's embeddings, before a projector, in the place of images; those that are not on the disk
    yet are made, by all ranks together, every one of which has to call.

    Args:
        tower: on its device.
        phase: entered for each pass.
    """
    assert stage.embedding_cache is not None
    config = {name: value for name, value in asdict(tower.config).items() if name not in _OF_NO_INFLUENCE}
    weights = digest_of(without_projector(tower.state_dict()), config)
    origin = origin_of(weights, how.resolution, how.precision, stage.augmentation, batches.seed)
    origin |= {"max_pixels": batches.cache.max_pixels}  # it decides which images have no embedding
    frozen = FrozenImages(Path(stage.embedding_cache).expanduser(), batches.indexed_images, origin)
    make_missing(
        frozen.stores,
        batches,
        "image",
        lambda store, n: (*_shard(tower, store.data, n, batches, stage, how, phase), {}),
        phase,
    )
    batches.frozen = frozen


def make_missing(
    stores: Mapping[Path, StoredVectors],
    batches: StageBatches,
    tower: str,
    make: Callable[[StoredVectors, int], tuple[np.ndarray, dict[int, str], dict[int, list[int]]]],
    phase: Phase,
) -> None:
    """Makes the shards that are missing or damaged, by all ranks together, every one of which has to call.

    Args:
        tower: "image" or "text", for the message.
        make: what `StoredVectors.write` gets of a shard.
    """
    local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    # Then what other machines have in folders of their own.
    for rank, world in ((batches.rank, batches.world), local) if several else ((0, 1),):
        for store in stores.values():
            missing = set(store.missing())
            own = [n for n in range(rank, len(store.data.shard_sizes), world) if n in missing or store.damaged(n)]
            if own and rank == 0:
                where = f"{store.data.directory}: {store.directory}"
                print(f"the frozen {tower} tower runs once over {where}", flush=True)
            for number in own:
                store.write(number, *make(store, number))
        if several:
            with phase():
                torch.distributed.barrier()


def _shard(
    tower: VisionTower, data: Dataset, number: int, batches: StageBatches, stage: Stage, how: Pass, phase: Phase
) -> tuple[np.ndarray, dict[int, str]]:
    """Embeddings `[n, V, D]` of a shard's images, and which of them are unusable."""
    samples, views = data.samples_of(number), stage.augmentation.views
    vectors = np.zeros((len(samples), views, tower.config.width), np.float32)
    unusable: dict[int, str] = {}
    rows: list[tuple[int, int]] = []
    pixels: list[torch.Tensor] = []

    def run() -> None:
        with phase():
            for (place, one), row in zip(rows, _embed(tower, torch.stack(pixels), how), strict=True):
                vectors[place, one] = row
        rows.clear()
        pixels.clear()

    for place, one, of_view in _views(data, samples, batches, stage, how.resolution, unusable):
        rows.append((place, one))
        pixels.append(of_view)
        if len(rows) == CHUNK:
            run()
    if rows:
        run()
    return vectors, unusable


def _views(
    data: Dataset, samples: range, batches: StageBatches, stage: Stage, resolution: int, unusable: dict[int, str]
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(place in the shard, number of the view, pixels) of every fixed view; adds to `unusable`."""
    decoded = SampleCache(0, batches.cache.max_pixels, negatives=False)  # keeps nothing
    for place, index in enumerate(samples):
        try:
            image, _ = decoded.sample(data, index)
        except ShardUnavailable as error:  # it may be there tomorrow: nothing is written that says otherwise
            raise UserError(str(error)) from error
        except (ShardError, ImageError) as error:
            unusable[place] = str(error)
            continue
        assert image is not None  # content_of guarantees it
        for number in range(stage.augmentation.views):
            seed = view_seed(batches.seed, data, index)
            yield place, number, view(image, resolution, stage.augmentation, seed, number, batches.inference)


@torch.no_grad()
def _embed(tower: VisionTower, images: torch.Tensor, how: Pass) -> np.ndarray:
    with torch.autocast(how.device.type, torch.bfloat16, enabled=how.precision == "bf16"):
        found: torch.Tensor = tower.pooled(tower.normalize(images.to(how.device)))
    return found.float().cpu().numpy()
