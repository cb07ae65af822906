"""The unified batch of jina-clip-v2 (arXiv 2412.08802, section 5.2): pairs of every modality in one InfoNCE."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive_losses.batch import Batch, Exchange, Options, problem_with_batch
from contrastive_losses.fused import pair_loss
from contrastive_losses.module import InfoNCE
from contrastive_losses.precision import Precision
from contrastive_losses.ranks import Group, refuse
from contrastive_losses.stats import LossStats

Pairs = tuple[Tensor, Tensor]  # [b, D] and [b, D], row i of both makes pair i
TEXT = 0x5DEECE66D1A3C9B7  # keeps ids of texts apart from those of images


def unified_info_nce(
    image_text: Pairs,
    text: Pairs,
    image_views: Pairs | None = None,
    *,
    temperature: float | Tensor,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    false_negative_margin: float | None = None,
    precision: Precision | None = None,
    exchange: Exchange = "auto",
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    group: Group | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """One InfoNCE with one temperature over images with their captions, texts with their answers, and two views of
    augmented images with each other, the last as in SimCLR (arXiv 2002.05709): a mean over all of these pairs in both
    directions.

    The first group of the paper's figure 3 is images, questions and one view; the second captions, answers and the
    other view. Every pair is a negative of every other, whatever its modality, except pairs that show one image: a
    caption is not told apart from an augmented view of its own image. (The paper does not say; this is our choice.) In
    the paper this starts well and stalls, its temperature staying near 0.02; a loss for each task, two InfoNCEs, went
    further.

    Args:
        image_text: images and captions, `[I, D]` each.
        text: questions and answers, or any text pairs, `[T, D]` each.
        image_views: two augmented views of the same I images, in the order of `image_text`, `[I, D]` each.
        image_ids: `[I]` int64; images with equal ids are one image, on whichever ranks they are. None: all differ,
            which must then be so on every rank.
        text_ids: `[T]` int64, the same for text pairs. They are not compared with those of images.
        temperature, dims, weights, false_negative_margin, precision, exchange, group, return_stats: as for
            `matryoshka_info_nce`; the statistics are those of the union.

    Raises:
        ValueError: as for `matryoshka_info_nce`.
    """
    problem = _problem(image_text, text, image_views, image_ids, text_ids)
    if problem is not None:
        refuse(problem, group)
    device = image_text[0].device
    of_images = _ids(image_ids, len(image_text[0]), group, device)
    of_texts = _ids(text_ids, len(text[0]), group, device) ^ TEXT
    parts = [(*image_text, of_images), (*text, of_texts)]
    if image_views is not None:
        parts.append((*image_views, of_images))
    first, second, ids = (torch.cat(columns) for columns in zip(*parts, strict=True))
    # Ids that one rank is given and another makes would meet.
    made = (image_ids is None, text_ids is None)
    return pair_loss(
        "exp",
        Batch(first, second, None, ids, None, None),
        Options(temperature, 0.0, dims, weights, false_negative_margin, precision, exchange),
        group=group,
        return_stats=return_stats,
        shared=made,
    )


class UnifiedInfoNCE(InfoNCE):
    """`unified_info_nce` with a temperature of its own; settings are those of `InfoNCE`."""

    def forward(  # type: ignore[override]
        self, image_text: Pairs, text: Pairs, image_views: Pairs | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, LossStats]:
        """See `unified_info_nce`, whose options (`image_ids`, `text_ids`, `group`, `return_stats`) these are."""
        return unified_info_nce(image_text, text, image_views, **self._settings(), **options)


def _ids(given: Tensor | None, size: int, group: Group | None, device: torch.device) -> Tensor:
    """`[size]` int64, those given, or numbers that no other row of the whole batch has."""
    if given is not None:
        return given
    rank = 0 if group is None else dist.get_rank(group)
    return torch.arange(size, device=device) + (rank << 40)


def _problem(
    image_text: Pairs, text: Pairs, image_views: Pairs | None, image_ids: Tensor | None, text_ids: Tensor | None
) -> str | None:
    """What keeps the parts from making one batch, in words, or None."""
    parts = {"image_text": (image_text, image_ids), "text": (text, text_ids)}
    if image_views is not None:
        parts["image_views"] = (image_views, image_ids)
    try:
        for name, ((first, second), ids) in parts.items():
            problem = problem_with_batch(Batch(first, second, None, ids, None, None))
            if problem is not None:
                return f"{name}: {problem}"
        widths = {name: pairs[0].shape[1] for name, (pairs, _) in parts.items()}
        if len(set(widths.values())) > 1:
            return f"the parts have widths {widths}; expected one width D for all, because all share one space"
        if image_views is not None and len(image_views[0]) != len(image_text[0]):
            found = f"{len(image_views[0])} image_views for {len(image_text[0])} images"
            return f"{found}; expected two views of each image, in the order of image_text"
    except Exception as error:  # a rank must not fail alone, see `problem_with_call`
        return f"the arguments cannot be read ({type(error).__name__}: {error}); see the documentation for their types"
    return None
