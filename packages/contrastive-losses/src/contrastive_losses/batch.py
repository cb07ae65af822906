"""The input of a loss, and the checks of it that need neither other ranks nor a GPU."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from operator import index
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from contrastive_losses.precision import Precision, problem_with_precision

SMALLEST_NORM = 1e-12  # a prefix no longer than this counts as the zero vector


Exchange = Literal["auto", "gather", "ring"]


class Batch(NamedTuple):
    """This rank's rows of a contrastive batch."""

    queries: Tensor  # [B, D]
    targets: Tensor  # [B, D]
    negatives: Tensor | None  # [B, K, D]
    query_ids: Tensor | None  # [B] int64
    target_ids: Tensor | None  # [B] int64
    sample_weights: Tensor | None  # [B]


class Options(NamedTuple):
    """What a loss is told beside its batch; `matryoshka_info_nce` describes each."""

    temperature: float | Tensor
    bias: float | Tensor
    dims: Sequence[int] | None
    weights: Sequence[float] | None
    margin: float | None
    precision: Precision | None
    exchange: Exchange = "auto"


def problem_with_call(batch: Batch, options: Options) -> str | None:
    """The first thing wrong with the arguments of a loss, in words, or None. It never raises: a rank that fails before
    the exchange with the others leaves them waiting."""
    try:
        return (
            problem_with_batch(batch)
            or problem_with_dims(options.dims, options.weights, width=batch.queries.shape[1])
            or problem_with_scalar("temperature", options.temperature, above=0.0)
            or problem_with_scalar("bias", options.bias)
            or problem_with_margin(options.margin)
            or problem_with_precision(options.precision, *batch[:3])
            or problem_with_exchange(options.exchange)
        )
    except Exception as error:  # such as a list where a tensor belongs
        return f"the arguments cannot be read ({type(error).__name__}: {error}); see the documentation for their types"


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
    for name, tensor in batch._asdict().items():
        if tensor is not None and tensor.device != queries.device:
            return f"{name} are on {tensor.device} but queries on {queries.device}; move them all to one device"
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
    for name, values in (("dims", dims), ("weights", weights)):
        if values is not None and not _is_row(values):
            return f"{name} are {values!r}; expected a list or tuple of numbers"
    if dims is not None and len(dims) == 0:
        return "dims are empty; expected at least one prefix length, or None for the full width"
    for dim in () if dims is None else dims:
        if (number := whole(dim)) is None or number < 1 or (width is not None and number > width):
            limit = "the embeddings' width" if width is None else f"D = {width}"
            return f"dims hold {dim!r}; expected whole numbers from 1 to {limit}"
    if weights is not None and len(weights) != (expected := 1 if dims is None else len(dims)):
        return f"{len(weights)} weights for {expected} dims; expected one weight for each dim, in the same order"
    if weights is not None and not all(map(_is_finite, weights)):
        return f"weights are {tuple(weights)}; expected finite numbers"
    return None


def _is_row(values: Any) -> bool:
    """Whether values are a list, a tuple or an array of one dimension. A dict from dims to weights would be read as its
    keys, a set in no order, and bytes as numbers."""
    if isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set) or not isinstance(values, Iterable):
        return False
    return hasattr(values, "__len__") and getattr(values, "ndim", 1) == 1


def _is_finite(weight: Any) -> bool:
    try:
        return not isinstance(weight, str | bytes | bytearray) and math.isfinite(weight)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch's and numpy's errors too
        return False


def whole(value: Any) -> int | None:
    """`value` as an int (numpy's and tensors' integers too), or None for anything else, True and False included."""
    try:
        number = index(value)
    except TypeError:
        return None
    return None if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool") else number


def problem_with_scalar(name: str, value: float | Tensor, above: float = -math.inf) -> str | None:
    """What is wrong with a temperature or a bias, or None. A tensor outside the CPU is checked by its shape only: its
    value would make the host wait for the GPU."""
    if isinstance(value, Tensor):
        if value.shape not in ((), (1,)):
            return f"{name} has shape {list(value.shape)}; expected a number, or a tensor of shape [] or [1]"
        if value.device.type != "cpu":
            return None
        value = value.detach()
    elif isinstance(value, bool):
        return f"{name} is {value}; expected a number"
    number = float(value)
    if not (number > above and math.isfinite(number)):
        return f"{name} is {number}; expected a finite number" + (f" above {above:g}" if above > -math.inf else "")
    return None


def problem_with_exchange(exchange: str) -> str | None:
    """What is wrong with the name of an exchange between ranks, or None."""
    if exchange not in get_args(Exchange):
        return f"exchange is {exchange!r}; expected one of {', '.join(get_args(Exchange))}"
    return None


def problem_with_margin(margin: float | None) -> str | None:
    """What is wrong with a margin between cosines, or None."""
    if margin is not None and not -2 <= margin <= 2:
        return f"false_negative_margin is {margin}; expected a difference of cosines from -2 to 2, such as 0.1, or None"
    return None
