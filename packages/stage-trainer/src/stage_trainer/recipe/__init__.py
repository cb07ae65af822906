"""Recipes: their schema, the rules for them, and reading them from a file. Nothing here imports torch."""

from stage_trainer.recipe.loss import LossConfig
from stage_trainer.recipe.remote import RemoteConfig
from stage_trainer.recipe.schema import (
    AugmentationConfig,
    BatchSizes,
    GradientCache,
    ModelConfig,
    OptimizerConfig,
    Rates,
    Recipe,
    Stage,
    Trainable,
    at_step,
)
from stage_trainer.recipe.sources import Source, StageData

__all__ = [
    "AugmentationConfig",
    "BatchSizes",
    "GradientCache",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Rates",
    "Recipe",
    "RemoteConfig",
    "Source",
    "Stage",
    "StageData",
    "Trainable",
    "at_step",
]
