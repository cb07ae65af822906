"""What a figure means: told by what measures it, before it measures, and never read off its name."""

from __future__ import annotations

from dataclasses import dataclass

OF_PAIRS = (
    "validation_recall_at_5_",
    "validation_ndcg_at_5_",
    "validation_ndcg_at_10_",
    "validation_spearman_",
    "modality_gap/",
)
OF_HIDDEN_WORDS = ("validation_loss_masked_lm/",)
"""How the names begin of all that a stage of either kind measures; the rest follows from the data."""


@dataclass(frozen=True)
class Measure:
    """A figure that a run takes on held-out data.

    Attributes:
        higher_is_better: of a loss, or a distance that should be small, it is not.
        headline: over all languages and at the full width: one of the few that a person wants first.
    """

    higher_is_better: bool = True
    headline: bool = False
