"""SigLIP's pairwise sigmoid loss over Matryoshka prefixes, with hard negatives."""

from collections.abc import Sequence

from torch import Tensor

from contrastive_losses.batch import Batch, Exchange, Options
from contrastive_losses.fused import pair_loss
from contrastive_losses.precision import Precision
from contrastive_losses.ranks import Group
from contrastive_losses.stats import LossStats


def matryoshka_sigmoid(
    queries: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    bias: float | Tensor,
    negatives: Tensor | None = None,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    sample_weights: Tensor | None = None,
    false_negative_margin: float | None = None,
    precision: Precision | None = None,
    exchange: Exchange = "auto",
    group: Group | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """The sigmoid loss of SigLIP (arXiv 2303.15343, section 3.2), summed over prefixes of the embeddings.

    Every pair of a query and a target is a yes-or-no question. With l(a, b) the cosine of two prefixes over the
    temperature and s(x) = log(1 + exp(x)), one prefix gives

        1/B sum_i [ s(-l(q_i, t_i) - bias) + sum_{j != i} s(l(q_i, t_j) + bias) + sum_jk s(l(q_i, n_jk) + bias) ].

    No pair depends on another, and each counts once: there are no two directions. Hard negatives, which SigLIP does not
    have, are further "no" pairs with every query.

    Args:
        bias: a number, or a tensor of shape `[]` or `[1]` with or without gradient.
        sample_weights: `[B]`, weigh the queries' rows: the mean over i becomes `sum(w * x) / sum(w)`.
        false_negative_margin: leaves out a target or hard negative of row i if cos(q_i, .) > cos(q_i, t_i) + margin.

    Every other argument, the result, the contract over ranks and the errors are those of `matryoshka_info_nce`, and so
    is `LossStats`: its accuracies ask which candidate is closest, as for InfoNCE.
    """
    return pair_loss(
        "sigmoid",
        Batch(queries, targets, negatives, query_ids, target_ids, sample_weights),
        Options(temperature, bias, dims, weights, false_negative_margin, precision, exchange),
        group=group,
        return_stats=return_stats,
    )
