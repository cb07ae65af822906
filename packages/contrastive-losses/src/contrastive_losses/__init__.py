"""Contrastive losses for two-tower models: Matryoshka InfoNCE with hard negatives, right on any number of ranks."""

from contrastive_losses.info_nce import LossStats, matryoshka_info_nce
from contrastive_losses.module import InfoNCE

__all__ = ["InfoNCE", "LossStats", "matryoshka_info_nce"]
