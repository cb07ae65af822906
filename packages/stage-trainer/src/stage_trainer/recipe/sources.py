"""The data sets that a stage draws from."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from stage_trainer.recipe.address import names_shards
from stage_trainer.recipe.values import STRICT, Float, Int, Lanes


@dataclass(frozen=True, config=STRICT)
class Source:
    """A data set (a directory with a manifest, below the corpus, or a URL) and how often it is drawn, relative to the
    others of its task.

    Where a sample has its text in several languages one is drawn; `target_language` names the language to prefer for
    the targets of text pairs (English as the pivot of thirty languages, for example).

    `graded` text pairs have a "score" each, as those of STS: their batches (each is from one source) are ranked by
    CoSENT (`contrastive_losses.matryoshka_cosent`) at the temperature of the text loss, instead of being contrasted.

    A `path` that ends in .tar names webdataset's shards one by one, `laion/{00000..41455}.tar`, which need no index:
    they are read in sequence, and shuffled in blocks of `shuffle_buffer` samples a lane. `caption_key`: the fields of
    their .json that hold the captions ("caption", or "meta.alt,title"); without it their .txt, or what a .json of this
    project's format says.
    """

    path: str
    rate: Float = 1.0
    target_language: str | None = None
    graded: bool = False
    shuffle_buffer: Int = 128
    caption_key: str | None = None

    @property
    def names_shards(self) -> bool:
        """Whether `path` names shards without a manifest."""
        return names_shards(self.path)


LANES = 64
"""Of `data.lanes: auto`."""


@dataclass(frozen=True, config=STRICT)
class StageData:
    """The data sets of each task. Those of `masked_lm` (text pairs or triplets, as single texts) have no rates: how
    often a language is drawn depends on its number of texts.

    The samples of each are drawn in `lanes`: the shards are dealt out into so many (of fewer shards each is one), every
    batch takes an equal part from each, and each rank reads only some. `auto` is `LANES`. More of them mix more shards
    in a batch; each has a shard open, and the next one fetched if data are remote."""

    image_text: tuple[Source, ...] = ()
    text: tuple[Source, ...] = ()
    masked_lm: tuple[str, ...] = ()
    lanes: Lanes = "auto"

    @property
    def lane_count(self) -> int:
        """The number that `lanes` stands for."""
        return LANES if self.lanes == "auto" else self.lanes
