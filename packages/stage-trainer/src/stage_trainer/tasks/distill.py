"""Distillation: texts, images and captions are drawn towards a teacher's embeddings of them, alone or beside the
contrastive tasks.

The teacher's embeddings are on the disk (`stage-trainer embed`): of a pair in two languages that of the text which the
teacher reads, towards which both texts go (Reimers and Gurevych, arXiv 2004.09813); of an image that of the image as it
is, towards which all of its augmented views go; of captions those of each or, in a language of the teacher's, of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from text_tower import Tokenizer
from text_tower.packed import to_device
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from stage_trainer.batch import Batch, Embedded
from stage_trainer.data.batches import StageBatches
from stage_trainer.data.taught import Taught
from stage_trainer.data.teachers import said
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.recipe import LossConfig, Stage
from stage_trainer.recipe.teacher import TeacherConfig
from stage_trainer.tasks.contrastive import ContrastiveTask
from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
from stage_trainer.tasks.task import Losses, TrainedObjective


class DistillTask(ContrastiveTask):
    @property
    def teacher(self) -> TeacherConfig:
        assert self.stage.teacher is not None  # or the stage would have another task
        return self.stage.teacher

    def make_objective(self, model: DualEncoder) -> TrainedObjective:
        return DistillObjective(model, self.stage.loss, self.recipe.precision, self.teacher)

    def make_batches(self, tokenizer: Tokenizer, rank: int, world: int) -> StageBatches:
        """With what the teacher says, which so is part of the run's fingerprint."""
        batches = super().make_batches(tokenizer, rank, world)
        batches.taught = self.taught(batches)
        return batches

    def taught(self, batches: StageBatches) -> Sequence[Taught]:
        """The batches' data sets with what the teacher says of them."""
        return said(self.teacher, batches.text_sources, batches.indexed_images, batches.cache)

    def prepare(
        self,
        model: nn.Module,
        batches: StageBatches,
        device: torch.device,
        phase: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Checks what the teacher says; it has to be there."""
        super().prepare(model, batches, device, phase)
        assert isinstance(model, DualEncoder)
        weights = batches.taught[0].weights
        for taught in batches.taught:
            with phase():
                found = taught.check(weights, self.stage.max_tokens)
            self.check_width(found, model)

    def check_width(self, found: int, model: DualEncoder) -> None:
        """UserError if the teacher's numbers are not comparable with the model's."""
        ours = model.text.config.output_width
        if self.teacher.loss == "cosine" and found > ours:
            raise UserError(
                f"the embeddings of {self.teacher.model} have {found} numbers and this model's {ours}; a cosine "
                "compares them one by one: set teacher.loss to 'relational'"
            )


class DistillObjective(ContrastiveObjective):
    """The contrastive losses, and that of the teacher. Arguments as for `ContrastiveObjective`, and the teacher's."""

    def __init__(self, model: DualEncoder, loss: LossConfig, precision: str, teacher: TeacherConfig):
        super().__init__(model, loss, precision)
        self.teacher = teacher

    def set_trainable(self, stage: Stage) -> None:
        super().set_trainable(stage)
        # Nothing is contrasted that reads them.
        for task, scale in self.logit_scales.items():
            if self.teacher.only_embeds(task):
                scale.requires_grad_(False)
            if self.teacher.replaces(task) and (bias := self.biases.get(f"{task}_bias")) is not None:
                bias.requires_grad_(False)

    def losses(
        self, embedded: Embedded, batch: Batch, *, pairs: tuple[str, ...], group: ProcessGroup | None = None
    ) -> Losses:
        """Those of `ContrastiveObjective`, of the tasks in which the teacher is not alone; "teacher" of text pairs, and
        "teacher_image_text" of images and captions."""
        contrasted = tuple(name for name in pairs if not self.teacher.replaces(name))
        found = super().losses(embedded, batch, pairs=contrasted, group=group) if contrasted else {}
        for task, name, loss in (
            ("image_text", "teacher_image_text", self.image_text_loss),
            ("text", "teacher", self.text_loss),
        ):
            if task in pairs and self.teacher.teaches(task):
                found[name] = self.teacher.weight * loss(embedded, batch, group), None
        return found

    def image_text_loss(self, embedded: Embedded, batch: Batch, group: ProcessGroup | None) -> Tensor:
        """That of what the teacher says of the batch's images and captions, over all ranks."""
        images = embedded.images[: len(batch.image_ids)]  # views come later
        rows = {"images": images, "captions": embedded.texts[: batch.captions]}
        taught = [what for what in rows if what in self.teacher.of]
        wanted = torch.cat([to_device(batch.teacher[what], embedded.images.device) for what in taught])
        return teacher_loss(torch.cat([rows[what] for what in taught]), wanted, self.teacher.loss, group)

    def text_loss(self, embedded: Embedded, batch: Batch, group: ProcessGroup | None) -> Tensor:
        """That of what the teacher says of the batch's text pairs, over all ranks."""
        texts = embedded.texts[batch.captions :][: 2 * batch.pairs]
        wanted = to_device(batch.teacher["texts"], texts.device).repeat(2, 1)
        return teacher_loss(texts, wanted, self.teacher.loss, group)


def teacher_loss(ours: Tensor, wanted: Tensor, kind: str, group: ProcessGroup | None = None) -> Tensor:
    """How far embeddings are from a teacher's, 0-d, float32 or as precise as ours, over those of all ranks.

    Gradients are W times those of this rank's rows, for W ranks, whose gradients are averaged.

    Args:
        ours: this rank's, float `[N, D]`.
        wanted: the teacher's, `[N, T]`.
        kind: "cosine": the mean of 1 - cos, with the first T numbers of ours; "relational": the mean squared difference
            of the cosines between them, ours and the teacher's, over all pairs of two of all ranks.
        group: the ranks that share the batch.
    """
    with torch.autocast(ours.device.type, enabled=False):
        dtype = torch.promote_types(ours.dtype, torch.float32)
        ours, wanted = ours.to(dtype), F.normalize(wanted.to(dtype), dim=-1)
        if kind == "cosine":
            near = (F.normalize(ours[:, : wanted.shape[1]], dim=-1) * wanted).sum(-1)
            return _mean_over_ranks(1 - near, group)
        own, all_ours = F.normalize(ours, dim=-1), _gathered(F.normalize(ours, dim=-1), group)
        differences = (own @ all_ours.T - wanted @ _gathered(wanted, group).T).square()
        # A row with itself differs by nothing. Gathered rows have no gradient: by symmetry own rows get half of it.
        others = max(1, len(all_ours) - 1)
        halves = 2 * differences - differences.detach()
        return _mean_over_ranks(halves.sum(1) / others, group)


def _mean_over_ranks(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """The mean of all ranks' rows, whose gradient is W times that of this rank's."""
    sums = torch.stack([rows.detach().sum(), rows.new_tensor(float(len(rows)))])
    world = 1
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
        world = torch.distributed.get_world_size(group)
    own = world * rows.sum() / sums[1]
    return own + (sums[0] / sums[1] - own).detach()


def _gathered(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all ranks, of which each may have another number, without their gradient."""
    rows = rows.detach()
    if group is None:
        return rows
    counts = rows.new_zeros(torch.distributed.get_world_size(group), dtype=torch.int64)
    counts[torch.distributed.get_rank(group)] = len(rows)
    torch.distributed.all_reduce(counts, group=group)
    sizes = counts.tolist()
    padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows))).contiguous()
    found = rows.new_empty(len(sizes) * max(sizes), rows.shape[1])
    torch.distributed.all_gather_into_tensor(found, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(torch.split(found, max(sizes)), sizes, strict=True)])
