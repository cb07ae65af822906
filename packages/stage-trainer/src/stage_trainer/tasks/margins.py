"""Triplets by the margins of a teacher's scores, alone or beside the contrastive tasks.

By how much a query is closer to its target than to each of its hard negatives, a cross-encoder says, whose scores are
on the disk (`stage-trainer embed`) or in the data (margin-MSE; Hofstätter et al., arXiv 2010.02666).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from contrastive_losses import matryoshka_margin_mse
from text_tower.packed import to_device
from torch import Tensor
from torch.distributed import ProcessGroup

from stage_trainer.batch import Batch, Embedded
from stage_trainer.data.batches import StageBatches
from stage_trainer.data.scored_texts import OwnScores
from stage_trainer.data.taught import Taught
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.tasks.distill import DistillObjective, DistillTask
from stage_trainer.tasks.task import TrainedObjective


class MarginsTask(DistillTask):
    def make_objective(self, model: DualEncoder) -> TrainedObjective:
        return MarginsObjective(model, self.stage.loss, self.recipe.precision, self.teacher)

    def taught(self, batches: StageBatches) -> Sequence[Taught]:
        if self.teacher.model is None:
            return (OwnScores(batches.text_sources, batches.cache),)
        return super().taught(batches)

    def check_width(self, found: int, model: DualEncoder) -> None:
        """Scores have no width to agree with ours."""


class MarginsObjective(DistillObjective):
    """The contrastive losses, and that of the teacher's margins. Arguments as for `DistillObjective`."""

    def text_loss(self, embedded: Embedded, batch: Batch, group: ProcessGroup | None) -> Tensor:
        queries, targets, negatives = torch.split(
            embedded.texts[batch.captions :], [batch.pairs, batch.pairs, batch.pairs * batch.negatives]
        )
        return matryoshka_margin_mse(
            queries,
            targets,
            negatives.view(batch.pairs, batch.negatives, embedded.texts.shape[1]),
            to_device(batch.teacher["texts"], queries.device),
            temperature=self.temperature_of("text", embedded),
            dims=self.loss.dims,
            weights=self.loss.weights or None,
            group=group,
        )
