"""A model from which a stage learns."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from stage_trainer.recipe.values import STRICT, Float


@dataclass(frozen=True, config=STRICT)
class TeacherConfig:
    """Draws our embeddings towards what a teacher says: `of` the `texts` of data.text, or of the `images` or `captions`
    of data.image_text. `folder` holds that, made by `stage-trainer embed`; training itself does not need the teacher.
    Each task's loss counts `weight` times beside the contrastive ones; `alone` it replaces that of its task.

    `cosine` and `relational` compare embeddings. `model` is any that `stage-trainer evaluate` takes: ours,
    sentence-transformers', open_clip's. `cosine` is one minus the cosine with the first T numbers of ours, for a
    teacher of T numbers, the mean over texts, or over images and captions. `relational` is for one of any width: the
    mean squared difference of our cosines from the teacher's, over all pairs of two texts in the global batch, or of
    two among its images and captions, whose embeddings every rank gathers.

    Of a pair of texts in two languages both go towards the teacher's embedding of the one that it reads, a sample's
    first text in `language` (None: the first of the query), in the manner of Reimers and Gurevych (arXiv 2004.09813).
    With `language` all captions of an image go towards the embedding of the first one in it; without, each goes towards
    its own. Images have the teacher's embedding of the image as it is, whatever view of it a step shows.

    `margin_mse` compares scores (Hofstätter et al., arXiv 2010.02666): of a triplet, by how much the query is closer to
    its target than to each hard negative; our scores are cosines over the temperature of the text loss, which learns
    here, too (`contrastive_losses.matryoshka_margin_mse`). `model` is a cross-encoder of sentence-transformers, whose
    logits are the scores; without `model` and `folder` they are those that the data have themselves ("scores"). Of
    alternative texts the teacher reads the first one in `language`, and the student any; without `language` both
    read the first."""

    model: str | None = None
    folder: str | None = None
    language: str | None = None
    loss: Literal["cosine", "relational", "margin_mse"] = "cosine"
    of: tuple[Literal["texts", "images", "captions"], ...] = ("texts",)
    weight: Float = 1.0
    alone: bool = False

    @property
    def scores(self) -> bool:
        """Whether it scores triplets, instead of embedding texts."""
        return self.loss == "margin_mse"

    def teaches(self, task: str) -> bool:
        """Whether it says something of the pairs of a task ("image_text", "text")."""
        return any((what == "texts") == (task == "text") for what in self.of)

    def taught(self, images: int, captions: int, pairs: int, negatives: int) -> tuple[int, ...]:
        """How many embeddings each of its losses reads, of so many of the batch."""
        shown = images * ("images" in self.of) + captions * ("captions" in self.of)
        texts = pairs * (2 + negatives * self.scores) * ("texts" in self.of)
        return tuple(count for count in (shown, texts) if count)

    def replaces(self, task: str) -> bool:
        """Whether there is no contrastive loss of the task."""
        return self.alone and self.teaches(task)

    def only_embeds(self, task: str) -> bool:
        """Whether nothing of the task is compared by a temperature, nor any hard negative read."""
        return self.replaces(task) and not self.scores

    @property
    def task(self) -> str:
        """The name of what a stage with this teacher does (`tasks.TASKS`)."""
        return "margins" if self.scores else "distill"
