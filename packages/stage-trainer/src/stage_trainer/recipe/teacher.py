"""A model whose embeddings a stage learns to give."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from stage_trainer.recipe.values import STRICT, Float


@dataclass(frozen=True, config=STRICT)
class TeacherConfig:
    """Draws the texts of data.text towards what a teacher says of one of them, in the manner of Reimers and Gurevych
    (arXiv 2004.09813): of a pair in two languages both texts, towards the teacher's embedding of the one that it reads.

    `model` is any that `stage-trainer evaluate` takes: ours, sentence-transformers', open_clip's. `folder` holds what
    it gives, made by `stage-trainer embed`; training itself does not need it. It reads a sample's first text in
    `language` (None: the first of the query).

    `cosine` is one minus the cosine with the first T numbers of ours, for a teacher of T numbers. `relational` is for
    one of any width: the mean squared difference of our cosines from the teacher's, over all pairs of texts in the
    global batch, whose embeddings every rank gathers. The loss counts `weight` times beside the contrastive ones;
    `alone` it replaces that of text pairs."""

    model: str
    folder: str
    language: str | None = None
    loss: Literal["cosine", "relational"] = "cosine"
    weight: Float = 1.0
    alone: bool = False
