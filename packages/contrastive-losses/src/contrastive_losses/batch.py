"""What a loss is computed from, and the checks that can be made on one process without waiting for a GPU."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Rows of a contrastive batch: those of one rank, or, after `ranks.gather_batch`, those of all of them."""

    queries: Tensor  # [B, D]
    targets: Tensor  # [B, D]
    negatives: Tensor | None  # [B, K, D]
    query_ids: Tensor | None  # [B] int64
    target_ids: Tensor | None  # [B] int64
    sample_weights: Tensor | None  # [B]


def problem_with_batch(batch: Batch) -> str | None:
    """The first thing wrong with the shapes and types of a batch, in words, or None."""
    queries, targets, negatives, *_ = batch
    if queries.dim() != 2:
        return f"queries have shape {list(queries.shape)}; expected [B, D]: pool each query to one row first"
    if targets.shape != queries.shape:
        return (
            f"targets have shape {list(targets.shape)} but queries {list(queries.shape)}; "
            "row i of both makes pair i, so give both the same [B, D]"
        )
    rows, width = queries.shape
    if negatives is not None and (negatives.dim() != 3 or negatives.shape[::2] != (rows, width)):
        return (
            f"negatives have shape {list(negatives.shape)}; expected [{rows}, K, {width}]: "
            "the K hard negatives of each query, unflattened"
        )
    for name, embeddings in (("queries", queries), ("targets", targets), ("negatives", negatives)):
        if embeddings is not None and not embeddings.is_floating_point():
            return f"{name} are {embeddings.dtype}; expected floating-point embeddings"
    for name, ids in (("query_ids", batch.query_ids), ("target_ids", batch.target_ids)):
        if ids is not None and (ids.shape != (rows,) or ids.dtype != torch.int64):
            return f"{name} are {ids.dtype} of shape {list(ids.shape)}; expected one int64 for each row: [{rows}]"
    weights = batch.sample_weights
    if weights is not None:
        if weights.shape != (rows,) or not weights.is_floating_point():
            return (
                f"sample_weights are {weights.dtype} of shape {list(weights.shape)}; "
                f"expected one floating-point number for each row: [{rows}]"
            )
        if weights.device.type == "cpu" and not bool((weights.isfinite() & (weights >= 0)).all()):
            low, high = float(weights.min()), float(weights.max())
            return f"sample_weights go from {low} to {high}; expected finite numbers, 0 or more"
    return None


def problem_with_dims(dims: Sequence[int] | None, weights: Sequence[float] | None, width: int | None) -> str | None:
    """What is wrong with Matryoshka dims and their weights, or None. `width` is D where it is known."""
    if dims is not None and len(dims) == 0:
        return "dims are empty; expected at least one prefix length, or None for the full width"
    for dim in dims or ():
        if not isinstance(dim, int) or dim < 1 or (width is not None and dim > width):
            limit = "the embeddings' width" if width is None else f"D = {width}"
            return f"dims hold {dim!r}; expected whole numbers from 1 to {limit}"
    if weights is not None and len(weights) != (expected := 1 if dims is None else len(dims)):
        return f"{len(weights)} weights for {expected} dims; expected one weight for each dim, in the same order"
    return None


def problem_with_temperature(temperature: float | Tensor) -> str | None:
    """What is wrong with a temperature, or None. Of a tensor that is not on the CPU, only the shape is checked:
    looking at its value would make the host wait for the GPU."""
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), (1,)):
            return f"temperature has shape {list(temperature.shape)}; expected a number, or a tensor of shape [] or [1]"
        if temperature.device.type != "cpu":
            return None
        temperature = temperature.detach()
    value = float(temperature)
    if not (value > 0 and math.isfinite(value)):
        return f"temperature is {value}; expected a finite number above 0, such as 0.07"
    return None
