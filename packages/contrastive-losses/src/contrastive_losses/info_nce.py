"""Bidirectional InfoNCE over Matryoshka prefixes, with hard negatives."""

from collections.abc import Sequence

from torch import Tensor

from contrastive_losses.batch import Batch, Exchange, Options
from contrastive_losses.fused import pair_loss
from contrastive_losses.precision import Precision
from contrastive_losses.ranks import Group
from contrastive_losses.stats import LossStats


def matryoshka_info_nce(
    queries: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
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
    """InfoNCE in both directions, summed over prefixes of the embeddings (jina-clip-v2, arXiv 2412.08802, section 3.3;
    hard negatives as in its section 3.4; prefixes as in arXiv 2205.13147).

    With l(a, b) the cosine of two prefixes over the temperature, one prefix gives the sum of the two directions' means:

        q->t:  -1/B sum_i log exp l(q_i, t_i) / (sum_j exp l(q_i, t_j) + sum_jk exp l(q_i, n_jk))
        t->q:  -1/B sum_i log exp l(q_i, t_i) /  sum_j exp l(q_j, t_i)

    Every query sees the hard negatives of the whole batch, not only its own; no target sees any.

    Args:
        queries: `[B, D]`, unnormalised: every prefix is normalised here. A prefix no longer than 1e-12 counts as the
            zero vector: its cosine with everything is 0 and so is its gradient.
        targets: `[B, D]`, row i the positive of query i.
        temperature: above 0; a number, or a tensor of shape `[]` or `[1]` with or without gradient. A tensor's value
            is checked on the CPU only: on other devices the host would wait.
        negatives: `[B, K, D]`, K hard negatives for each query.
        dims: prefix lengths between 1 and D, in any order, each counted as often as it stands there. None is `(D,)`.
        weights: one factor for each of `dims`, in the same order. None is 1 for each.
        query_ids: `[B]` int64. Pairs with an equal query id are never each other's negatives, in both directions.
            The positive itself is never masked, nor are hard negatives, which have no id.
        target_ids: `[B]` int64, the same for targets. The two kinds of id are never compared with each other.
        sample_weights: `[B]`, 0 or more, without gradient: each mean over the batch becomes `sum(w * x) / sum(w)`. A
            row of weight 0 still is a negative for the others; if all are 0, so is the loss.
        false_negative_margin: leave a candidate out as an unlabelled positive where its cosine exceeds the positive's
            by more than this: target j and hard negatives from the row of query i where cos(q_i, .) >
            cos(q_i, t_i) + margin, query j from the column of target i where cos(q_j, t_i) > cos(q_i, t_i) + margin.
            Each prefix decides by its own cosines, to the precision of the products. Qwen3-Embedding takes 0.1
            (arXiv 2506.05176, section 3); a negative margin also drops what comes close. None: off.
        precision: of the products of float32 embeddings. "bf16" rounds the embeddings to bfloat16 first, on every
            device, and computes from there what it does for bfloat16 embeddings; gradients stay float32. "tf32" and
            "ieee" count on a GPU. None leaves them to `torch.set_float32_matmul_precision`. Cosines of width D have
            errors of about 2^-9 / sqrt(D) in "bf16" and a quarter of it in "tf32".
        exchange: how ranks see each other's queries: "gather" holds those of all ranks, and their gradients, at once:
            O(B * D) on each. "ring" passes them round, a rank's rows at a time: O(B * D / W), for a third to a half
            more bytes and W messages instead of one; the result is the same but for rounding. "auto" gathers where
            they take up to 4 GiB.
        group: a process group: the batch is then the rows of all its ranks, and every rank must call this, and then
            backward, even if its own inputs need no gradient. The number of rows may differ between ranks and be 0 on
            some; all else must agree. Every rank returns the identical loss of the whole batch. Its input gradients
            are W (the number of ranks) times the derivative of that loss and its temperature gradient is the
            derivative, so that parameter gradients *averaged* over ranks, as by DDP and DeepSpeed, are those of one
            process with the whole batch. None: no communication, whatever is launched.
        return_stats: return `(loss, LossStats)`.

    Returns:
        The loss, 0-d: float64 if any embeddings are, else float32, whatever autocast says. It is nan if any embedding
        that a dim reads is nan or infinite, and so are the gradients that depend on it. Memory is O(B * D) on each
        rank, B being the rows of all ranks (in a ring its own): forward and backward go over tiles of the logits and
        keep none.

    Raises:
        ValueError: shapes, dims, weights or temperature that do not fit. With a group, on every rank, whichever has
            the bad input and also if the ranks disagree, so that none is left waiting.
        RuntimeError: from backward with `create_graph=True`, because there are no gradients of gradients, and under
            `torch.func`'s transforms. `contrastive_losses.plain.plain_info_nce` has them.
    """
    return pair_loss(
        "exp",
        Batch(queries, targets, negatives, query_ids, target_ids, sample_weights),
        Options(temperature, 0.0, dims, weights, false_negative_margin, precision, exchange),
        group=group,
        return_stats=return_stats,
    )
