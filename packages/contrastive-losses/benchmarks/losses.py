"""The losses that the benchmarks set side by side: (queries `[B, D]`, targets `[B, D]`, temperature, dims) -> loss.
All are the same number: the sum of both directions and of the prefixes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from contrastive_losses import matryoshka_info_nce
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def ours(queries: Tensor, targets: Tensor, temperature: Tensor, dims: Sequence[int]) -> Tensor:
    loss = matryoshka_info_nce(queries, targets, temperature=temperature, dims=dims)
    assert isinstance(loss, Tensor)
    return loss


def ours_with_statistics(queries: Tensor, targets: Tensor, temperature: Tensor, dims: Sequence[int]) -> Tensor:
    return matryoshka_info_nce(queries, targets, temperature=temperature, dims=dims, return_stats=True)[0]


def careful_loop(queries: Tensor, targets: Tensor, temperature: Tensor, dims: Sequence[int]) -> Tensor:
    """One normalised slice and one product for each dim, used for both directions."""
    answer = torch.arange(len(queries), device=queries.device)
    loss = queries.new_zeros((), dtype=torch.float32)
    for dim in dims:
        logits = F.normalize(queries[:, :dim], dim=1) @ F.normalize(targets[:, :dim], dim=1).T / temperature
        loss = loss + F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)
    return loss


def open_clip_loop(queries: Tensor, targets: Tensor, temperature: Tensor, dims: Sequence[int]) -> Tensor:
    """open_clip's ClipLoss at each dim; it has no Matryoshka loss of its own."""
    from open_clip.loss import ClipLoss

    of_one_dim, scale = ClipLoss(), 1 / temperature
    pairs = ((F.normalize(queries[:, :dim], dim=1), F.normalize(targets[:, :dim], dim=1)) for dim in dims)
    return 2 * torch.stack([of_one_dim(left, right, scale) for left, right in pairs]).sum()


def sentence_transformers(queries: Tensor, targets: Tensor, temperature: Tensor, dims: Sequence[int]) -> Tensor:
    """Its MatryoshkaLoss over its symmetric ranking loss, which takes the mean of the directions. Its scale is a plain
    number: the temperature gets no gradient."""
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    model: Any = _AlreadyEmbedded(queries.shape[1])
    symmetric = MultipleNegativesRankingLoss(
        model,
        scale=1 / temperature.item(),
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    of_all_dims = MatryoshkaLoss(model, symmetric, matryoshka_dims=list(dims))
    loss: Tensor = of_all_dims([{"sentence_embedding": queries}, {"sentence_embedding": targets}], None)
    return 2 * loss


class _AlreadyEmbedded(torch.nn.Module):
    """A model whose features are embeddings already, so that the loss alone is measured."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return self.width


LOSSES: dict[str, Loss] = {
    "contrastive_losses": ours,
    "the same with statistics": ours_with_statistics,
    "careful loop": careful_loop,
    "open_clip at each dim": open_clip_loop,
    "sentence-transformers": sentence_transformers,
}
