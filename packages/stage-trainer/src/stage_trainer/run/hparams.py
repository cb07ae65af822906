"""The settings that TensorBoard's HPARAMS page shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COMPARED = (
    "stage.batch.", "stage.lr.", "stage.steps", "stage.warmup_steps", "stage.min_lr_ratio", "stage.max_tokens",
    "stage.resolution", "stage.patch_dropout", "stage.layer_decay.", "stage.loss.kind", "stage.loss.dims",
    "stage.trainable.", "optimizer.name", "optimizer.weight_decay", "model.temperature", "precision", "seed",
)  # fmt: skip
"""Settings on TensorBoard's HPARAMS page, by prefix: among all sixty, in alphabetical order, these would be lost."""


def compared(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The settings for the HPARAMS page, as types that it accepts."""
    return {
        name.removeprefix("stage."): value if isinstance(value, str | int | float | bool) else str(value)
        for name, value in settings.items()
        if name.startswith(_COMPARED) and not (name.startswith("stage.batch.") and not value)
    }
