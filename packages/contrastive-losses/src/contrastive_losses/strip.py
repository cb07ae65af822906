"""One rank's part of the loss, and the contract between the loss and the modules that compute its tiles.

A *strip* is every query of the whole batch against the columns that this rank holds, its own targets and its own hard
negatives, for all Matryoshka prefixes at once. All B x B work is done by two functions of one module, which never keep
anything of the size of the strip:

    strip_sums(strip, *, maxima: bool) -> Sums
    strip_gradients(strip, row_weight, row_log_sum, column_weight, column_log_sum, reference, needs) -> Gradients

`torch_tiles` has them in plain torch, `triton_tiles` for CUDA. `fused.tiles_for` chooses, once for each pass.

Logits are l[p, i, j] = scale * cos(queries[i, :dims[p]], columns[j, :dims[p]]), with

    cos = <queries[i, :d], columns[j, :d]> * query_inverse_norm[p, i] * column_inverse_norm[p, j].

Some logits are *hidden*: they count in no sum, no maximum and no gradient. Target column j belongs to pair
g = strip.first + j. Its logit with query i is hidden

  * if i == g: positives are left to the caller, who treats them analytically;
  * if query_ids are given and query_ids[i] == query_ids[g]; likewise target_ids (both hold the ids of the whole batch);
  * if `margin` is given: from row i where l > scale * (positive[p, i] + margin), and from column j where
    l > scale * (positive[p, g] + margin). Only here do the two directions differ.

A hard negative is hidden by the margin's row rule alone; it takes part in no column sum.

`strip_sums`. For link "exp": the natural logarithm of the sum of exp(l) over each row (targets and hard negatives) and
down each target column; -inf where nothing counts. For link "sigmoid": the sums of softplus(l + bias) over each row,
and zeros for the columns. Logits are float32 at least, whatever the embeddings are; sums are combined across tiles in
float64. It must be correct at every scale: one shift for all rows is not enough if a row's cosines are all near -1. A
nan in the embeddings must give nan.

`strip_gradients` computes the same logits again, hides the same ones, and takes for the derivative by l[p, i, j]

    exp:      G = row_weight[p, i] * exp(l - row_log_sum[p, i]) + column_weight[p, j] * exp(l - column_log_sum[p, j])
    sigmoid:  G = row_weight[p, i] * sigmoid(l + bias)

with the row term alone for hard negatives; "sigmoid" ignores the other three of these arguments. Here the log sums
include the positives, so no exponential exceeds 1 but for rounding. `reference` `[P]` float64 is for the derivative by
the scale: a cosine like that of the pairs, or 0, which it has to be where a norm is. `Gradients` says what is returned.
Orders of summation must be fixed: same inputs, same bits.

The logits are the products times `factors`, in both: the caller allows for the rounding of these.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)


class Strip(NamedTuple):
    """B queries of all ranks, n targets and m hard negatives of this rank, P prefixes. B, n and m may be 0. Embeddings
    are raw, of any floating dtypes; the float64 tensors are on the same device."""

    link: Literal["exp", "sigmoid"]
    dims: tuple[int, ...]  # [P] ascending, distinct
    margin: float | None
    first: int  # the pair to which target column 0 belongs
    queries: Tensor  # [B, D]
    targets: Tensor  # [n, D]
    negatives: Tensor  # [m, D]
    query_inverse_norm: Tensor  # [P, B] float64; 0 for a zero prefix, whose cosines are all 0
    target_inverse_norm: Tensor  # [P, n] float64
    negative_inverse_norm: Tensor  # [P, m] float64
    scale: Tensor  # 0-d float64, 1 / temperature: any positive number
    bias: Tensor  # 0-d float64, for "sigmoid"
    # Of the pairs of all queries; where columns belong to none of these (`ring`), of the columns' pairs behind them.
    query_ids: Tensor | None  # [B] int64
    target_ids: Tensor | None  # [B] int64
    positive: Tensor  # [P, B] float64, cosines of the pairs


def logit_dtype(strip: Strip) -> torch.dtype:
    """float64 if any embeddings are, else float32."""
    dtype = torch.promote_types(strip.queries.dtype, strip.targets.dtype)
    return torch.promote_types(torch.promote_types(dtype, strip.negatives.dtype), torch.float32)


def blocks(dims: tuple[int, ...]) -> list[slice]:
    """The columns that each prefix adds to the one before."""
    return [slice(low, high) for low, high in zip((0, *dims), dims, strict=False)]


class Factors(NamedTuple):
    """The factors that make a raw product a logit, for its row and for its column, in the dtype of logits."""

    query: Tensor  # [P, B] unit * scale * inverse norm
    target: Tensor  # [P, n] inverse norm
    negative: Tensor  # [P, m] inverse norm


def factors(strip: Strip, unit: float) -> Factors:
    """For logits in this unit; LOG2E is that of powers of 2."""
    queries = unit * strip.scale * strip.query_inverse_norm
    dtype = logit_dtype(strip)
    return Factors(queries.to(dtype), strip.target_inverse_norm.to(dtype), strip.negative_inverse_norm.to(dtype))


def split_exponent(exponent: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a, b) with 2^-exponent = b * 2^-a and a in `dtype`. In float32 an exponent of 100 alone would leave the power
    no more than five digits."""
    rounded = exponent.to(dtype)
    return rounded, torch.exp2(rounded - exponent)


class Sums(NamedTuple):
    row: Tensor  # [P, B] float64
    column: Tensor  # [P, n] float64
    row_max: Tensor | None  # [P, B] float64: the greatest cosine that counts in each row, -inf if none; if asked for
    column_max: Tensor | None  # [P, n] float64: the same for columns


class Needs(NamedTuple):
    """Which products are wanted, and whether `centred` is. The moments always are."""

    queries: bool
    targets: bool
    negatives: bool
    scale: bool


class Gradients(NamedTuple):
    """With H[p, i, j] = G * scale * query_inverse_norm[p, i] * column_inverse_norm[p, j], the derivative of the loss by
    the raw product of two prefixes at fixed norms. The caller adds what comes from the norms; the moments suffice."""

    queries: Tensor | None  # [B, D], float32 at least: sum over prefixes p and columns j of H * columns[j, :dims[p]]
    targets: Tensor | None  # [n, D]: sum over p and i of H * queries[i, :dims[p]]
    negatives: Tensor | None  # [m, D]
    row_moment: Tensor  # [P, B] float64: sum over all columns j of G * l
    target_moment: Tensor  # [P, n] float64: sum over i of G * l
    negative_moment: Tensor  # [P, m] float64
    centred: Tensor  # 0-d float64: sum of all G * (l - scale * reference[p]); 0 if not asked for
    total: Tensor  # 0-d float64: the sum of all G for "sigmoid", whose bias needs it; 0 for "exp"
