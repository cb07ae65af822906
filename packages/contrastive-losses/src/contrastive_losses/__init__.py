"""Contrastive losses for two-tower models: Matryoshka prefixes, hard negatives, memory O(B·D), right on any number of
ranks."""

from contrastive_losses.cosent import matryoshka_cosent
from contrastive_losses.info_nce import matryoshka_info_nce
from contrastive_losses.margin_mse import matryoshka_margin_mse
from contrastive_losses.module import InfoNCE, SigmoidLoss
from contrastive_losses.sigmoid import matryoshka_sigmoid
from contrastive_losses.stats import LossStats
from contrastive_losses.unified import UnifiedInfoNCE, unified_info_nce

__all__ = [
    "InfoNCE",
    "LossStats",
    "SigmoidLoss",
    "UnifiedInfoNCE",
    "matryoshka_cosent",
    "matryoshka_info_nce",
    "matryoshka_margin_mse",
    "matryoshka_sigmoid",
    "unified_info_nce",
]
