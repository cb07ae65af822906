"""The kinds of stages: what rules, commands and pages need to know of a way to train, without its task (`tasks/`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What differs between the kinds outside of their tasks.

    Attributes:
        task: the name of what a stage does without a teacher (`tasks.TASKS`); of a kind other than pairs also that of
            its part of `batch` and of `data`.
        title: in messages.
        both_towers: whether a stage leaves a model of both, which is evaluated, searched and exported.
        metrics: how the names of all that a stage may measure begin; the rest of a name depends on the data.
        own_held_out: whether it is measured on the validation split of what it trains on, not on `evaluation.pools`.
        rotary: whether it is for text towers with rotary positions alone.
        unplanned: why `stage-trainer plan` leaves a stage out; "" if it does not.
    """

    task: str
    title: str
    both_towers: bool
    metrics: tuple[str, ...]
    own_held_out: bool = False
    rotary: bool = False
    unplanned: str = ""


PAIRS = Kind(
    task="contrastive",
    title="training on pairs",
    both_towers=True,
    metrics=(
        "validation_recall_at_5_",
        "validation_ndcg_at_5_",
        "validation_ndcg_at_10_",
        "validation_spearman_",
        "modality_gap/",
    ),
)
MASKED_LM = Kind(
    task="masked_lm",
    title="masked-language-model training",
    both_towers=False,
    metrics=("validation_loss_masked_lm/",),
    own_held_out=True,
    rotary=True,
    unplanned="masked-language-model training adds up chunks of any size (gradient_cache.tokens)",
)
OTHERS = (MASKED_LM,)
"""A stage is of one of these if it has a batch size of that name, else it trains on pairs."""


def kind_of(batch_size: Callable[[str], object]) -> Kind:
    """The kind of a stage with these batch sizes, by name."""
    return next((kind for kind in OTHERS if batch_size(kind.task)), PAIRS)
