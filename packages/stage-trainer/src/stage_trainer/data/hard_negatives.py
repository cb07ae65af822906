"""Hard negatives of a stage's samples: how many each query and each caption has, and what has no place for them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from data_prep.shards import IMAGE_TRIPLETS, Dataset, ShardError
from vision_tower import ImageError

from stage_trainer.data.samples import REPLACEMENTS, SampleCache
from stage_trainer.data.streamed import StreamedShards
from stage_trainer.errors import UserError
from stage_trainer.recipe import Stage

_NAMES = {"text-triplets": "negatives", IMAGE_TRIPLETS: "negative_images"}
"""Under which name `SampleCache.sample` gives the hard negatives of a sample, by the kinds that have any."""


def of_texts(stage: Stage, sources: Sequence[Dataset], cache: SampleCache) -> int:
    """K of a stage's text triplets, as the first sample of the first source has it; 0 for pairs, and if nothing reads
    them.

    Raises:
        UserError: the stage has no place for them, or none of the first ones can be read.
    """
    if not sources or stage.only_embeds("text"):
        return 0
    found = negatives_of(sources[0], cache)
    if found and stage.loss.kind == "unified":
        raise UserError("a unified loss has no place for the hard negatives of triplets; name text pairs in data.text")
    return found


def of_images(stage: Stage, sources: Sequence[Dataset | StreamedShards], cache: SampleCache) -> int:
    """Hard-negative images of each caption, as the first sample of the first source has them; 0 without any, and if
    nothing reads them. Errors as `of_texts`, and sources of which some have them."""
    triplets = [data for data in sources if data.kind == IMAGE_TRIPLETS]
    if not triplets or stage.only_embeds("image_text"):
        return 0
    assert isinstance(triplets[0], Dataset)  # streamed shards are of another kind
    if other := next((data for data in sources if data.kind != IMAGE_TRIPLETS), None):
        raise UserError(
            f"data.image_text mixes {IMAGE_TRIPLETS}/{triplets[0].source} and {other.kind}/{other.source}; a stage "
            "takes captions with hard-negative images or captions without, because all captions of a batch have as many"
        )
    for found, place in (
        (stage.loss.kind == "unified", "a unified loss has no place"),
        ("image" in stage.stored, "'embedding_cache' keeps the embeddings of captioned images, and has no place"),
    ):
        if found:
            raise UserError(
                f"{place} for the hard-negative images of {triplets[0].directory}; leave it out, or name data of "
                "image-short or image-long in data.image_text"
            )
    return negatives_of(triplets[0], cache)


def negatives_of(data: Dataset, cache: SampleCache) -> int:
    """How many hard negatives the first sample of a data set has that can be read; 0 of kinds without any.

    Raises:
        UserError: none of the first ones can be read.
    """
    if data.kind not in _NAMES:
        return 0
    for index in range(min(REPLACEMENTS, len(data))):
        with contextlib.suppress(ShardError, ImageError):  # it is entered in the ledger when it is drawn
            return len(cache.sample(data, index)[1][_NAMES[data.kind]])
    raise UserError(f"{data.directory}: none of its first {REPLACEMENTS} triplets can be read")


def check_as_many(data: Dataset, index: int, content: dict[str, Any], wanted: int) -> None:
    """ShardError if a sample has not the number of hard negatives that its stage takes of each (0: reads none of).

    Args:
        content: as `SampleCache.sample` gives it.
    """
    if not wanted or data.kind not in _NAMES:
        return
    found = len(content[_NAMES[data.kind]])
    if found != wanted:
        raise ShardError(
            f"{data.directory}: sample {data.row(index).key} has {found} negatives; the first triplet of the stage has "
            f"{wanted}, and all need as many"
        )
