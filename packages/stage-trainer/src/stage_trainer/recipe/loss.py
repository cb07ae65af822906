"""What a stage minimises."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from stage_trainer.recipe.values import STRICT, Float, Int


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """A loss over pairs, summed over `dims`, each times its one of `weights` (none: 1).

    `multi_task`: InfoNCE for each task (paper, 3.3, 3.4). `sigmoid`: SigLIP's loss for each task instead
    (`contrastive_losses.matryoshka_sigmoid`), whose biases start at `bias` in a model that has none. `unified`: one
    InfoNCE for the pairs of both tasks in one batch, and for two strongly augmented views of each image unless
    `image_views` is false (section 5.2; `contrastive_losses.unified_info_nce`).

    `temperature`: `each` task learns its own, both tasks learn one (`shared`), or they stay `fixed` where they start
    (`model.temperature`). Those that learn stay at `min_temperature` or above. `false_negative_margin` leaves out what
    is closer to a query than its positive by more than this cosine, as an unlabelled positive (arXiv 2506.05176).

    `exchange`: how ranks see each other's queries, gathered at once, or passed round in a `ring`, which keeps a rank's
    memory at its own rows' (`contrastive_losses.matryoshka_info_nce`). `auto` gathers up to 4 GiB. Of graded
    pairs ranks see no embeddings at all, only cosines."""

    kind: Literal["multi_task", "sigmoid", "unified"] = "multi_task"
    dims: tuple[Int, ...] = ()
    weights: tuple[Float, ...] = ()
    image_views: bool = True
    temperature: Literal["each", "shared", "fixed"] = "each"
    min_temperature: Float = 0.01
    bias: Float = -10.0
    false_negative_margin: Float | None = None
    exchange: Literal["auto", "gather", "ring"] = "auto"

    @property
    def one_temperature(self) -> bool:
        """Whether that of the image-text loss serves text pairs too."""
        return self.kind == "unified" or self.temperature == "shared"

    def learns_temperature(self, task: str) -> bool:
        """Whether a task that takes part ("image_text", "text") trains a temperature of its own."""
        return self.temperature != "fixed" and (task == "image_text" or not self.one_temperature)

    @property
    def views(self) -> int:
        """Augmented views of each image, in addition to the one that goes with its caption."""
        return 2 if self.kind == "unified" and self.image_views else 0

    def unified_pairs(self, captions: int, pairs: int) -> int:
        """Pairs of a unified loss over so many captioned images and text pairs; 0 if each task has its own loss."""
        return captions * (1 + self.views // 2) + pairs if self.kind == "unified" else 0
