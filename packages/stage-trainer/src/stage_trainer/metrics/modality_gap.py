"""The modality gap (Liang et al., 2022, arXiv 2203.02053)."""

from __future__ import annotations

import numpy as np

from stage_trainer.metrics.retrieval import unit


def modality_gap(images: np.ndarray, texts: np.ndarray) -> float:
    """The distance between the means of image and text embeddings, `[N, D]` and `[M, D]`, on the unit sphere."""
    return float(np.linalg.norm(unit(images).mean(axis=0) - unit(texts).mean(axis=0)))
