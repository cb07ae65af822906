"""The kinds of stages: what rules, commands and pages need to know of a way to train, without its task (`tasks/`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What differs between the kinds outside of their tasks.

    Attributes:
        task: the name of what a stage does without a teacher (`tasks.TASKS`).
        title: in messages.
        has_encoder: whether a stage leaves a model of both towers, which is evaluated, searched and exported.
        metrics: how the names of all that a stage may measure begin; the rest of a name depends on the data.
        held_out: the part of `data` on whose validation split it is measured; None: on `evaluation.pools`.
        rotary: whether it is for text towers with rotary positions alone.
        unplanned: why `stage-trainer plan` leaves a stage out; "" if it does not.
    """

    task: str
    title: str
    has_encoder: bool
    metrics: tuple[str, ...]
    held_out: str | None = None
    rotary: bool = False
    unplanned: str = ""


PAIRS = Kind(
    task="contrastive",
    title="training on pairs",
    has_encoder=True,
    metrics=(
        "validation_recall_at_5_",
        "validation_ndcg_at_5_",
        "validation_ndcg_at_10_",
        "validation_spearman_",
        "modality_gap/",
    ),
)
KINDS = {
    "masked_lm": Kind(
        task="masked_lm",
        title="masked-language-model training",
        has_encoder=False,
        metrics=("validation_loss_masked_lm/",),
        held_out="masked_lm",
        rotary=True,
        unplanned="masked-language-model training adds up chunks of any size (gradient_cache.tokens)",
    )
}
"""By the batch size that makes a stage one of this kind (`BatchSizes`); all others train on pairs."""


def kind_of(batch_size: Callable[[str], object]) -> Kind:
    """The kind of a stage with these batch sizes, by name."""
    return next((kind for name, kind in KINDS.items() if batch_size(name)), PAIRS)
