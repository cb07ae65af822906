"""The part of a recipe that data are read by."""

from __future__ import annotations

from dataclasses import dataclass

from stage_trainer.recipe import Recipe, RemoteConfig


@dataclass(frozen=True)
class DataConfig:
    """Where data are (`corpus`), how they are read, how much each process keeps decoded, and the
    largest image that is decoded at all, and by how many `workers` of a rank."""

    corpus: str
    remote: RemoteConfig
    cache_megabytes: int
    max_pixels: int
    workers: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> DataConfig:
        return cls(recipe.corpus, recipe.remote, recipe.cache_megabytes, recipe.max_pixels, recipe.workers)
