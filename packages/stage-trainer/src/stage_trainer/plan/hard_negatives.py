"""How many hard negatives a stage's samples have, as far as their data tell before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data_prep.shards import IMAGE_TRIPLETS, Dataset, ShardError, negative_images

from stage_trainer.data.config import DataConfig
from stage_trainer.data.remote_data import place
from stage_trainer.data.samples import texts_of
from stage_trainer.recipe import Source, Stage

TRIPLETS = 7  # hard negatives of a triplet, where no data says otherwise (arXiv 2412.08802, section 3.4)


class Negatives(NamedTuple):
    """Hard negatives of each text pair, and hard-negative images of each caption."""

    texts: int = 0
    images: int = 0


def hard_negatives(data: DataConfig, stage: Stage) -> Negatives:
    """Those of the stage's triplets, read from the first sample; guessed from the folder's name if the data is missing.
    0 if nothing reads them."""
    return Negatives(
        0 if stage.only_embeds("text") else _of_first(data, stage.data.text, "text-triplets"),
        0 if stage.only_embeds("image_text") else _of_first(data, stage.data.image_text, IMAGE_TRIPLETS),
    )


def _of_first(config: DataConfig, sources: tuple[Source, ...], triplets: str) -> int:
    """Of the first sample of the first source, if it is of the kind `triplets`."""
    if not sources:
        return 0
    path = sources[0].path
    where, guess = place(config, "train", path), TRIPLETS if triplets in path.split("/") else 0
    if not isinstance(where, Path):
        return guess
    try:
        data = Dataset.open(where, check=False)
        members = data.read(0) if data.kind == triplets else {}
        return len(negative_images(data.kind, members) or texts_of(data, 0, members)["negatives"]) if members else 0
    except (ShardError, OSError, IndexError):
        return guess
