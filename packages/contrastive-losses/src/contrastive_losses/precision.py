"""The precision of products of float32 embeddings, where a loss is told one. All else stays float32 and float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

Precision = Literal["ieee", "tf32", "bf16"]


def problem_with_precision(precision: str | None, *embeddings: Tensor | None) -> str | None:
    """What is wrong with a precision for these embeddings, in words, or None."""
    if precision is None:
        return None
    if precision not in get_args(Precision):
        return f"precision is {precision!r}; expected one of {', '.join(get_args(Precision))}, or None"
    if any(each is not None and each.dtype == torch.float64 for each in embeddings):
        return f"precision is {precision!r} and there are float64 embeddings, which it would round; leave it None"
    return None


def rounded(embeddings: Tensor, precision: Precision | None) -> Tensor:
    """The embeddings whose products are taken: for "bf16" float32 ones are rounded, once, before they are exchanged."""
    return embeddings.bfloat16() if precision == "bf16" and embeddings.dtype == torch.float32 else embeddings


@contextmanager
def products_in(precision: Precision | None, device: torch.device) -> Iterator[None]:
    """Lets float32 products on a GPU be computed in "ieee" or "tf32", in Triton's kernels and in PyTorch's."""
    if device.type != "cuda" or precision in (None, "bf16"):
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
