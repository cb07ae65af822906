"""A check of the Triton kernels on the present GPU, before they are used.

A compiler or driver that miscompiles them would show only in a worse model, so the first loss on a device computes a
small strip both ways: milliseconds, beside the compilation that it needs anyway.
"""

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from contrastive_losses import torch_tiles, triton_tiles
from contrastive_losses.strip import Needs, Strip

# Above what TF32 and 16 bits cost, below a single row or column that is wrong.
TOLERANCE = 0.02


@functools.cache
def kernels_are_right(device: torch.device, dtype: torch.dtype, precision: str) -> bool:
    """Whether the kernels agree with `torch_tiles` for such embeddings on this device; if not, it warns.

    Args:
        device, dtype: of the embeddings.
        precision: that is set for float32 products; each has kernels of its own.
    """
    strip = _trial(device, dtype)
    sums, gradients = _results(triton_tiles, strip)
    right_sums, right_gradients = _results(torch_tiles, strip)
    off = [(ours - right).abs().max() for ours, right in zip(sums, right_sums, strict=True)]
    off += [(ours - right).norm() / right.norm() for ours, right in zip(gradients, right_gradients, strict=True)]
    if bool((torch.stack(off) <= TOLERANCE).all()):  # not if there is a nan
        return True
    warnings.warn(
        f"the Triton kernels of contrastive_losses differ from plain PyTorch for {dtype} on {device}, so the losses "
        "are left to plain PyTorch, which is slower; please report this with your versions of torch and triton",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _trial(device: torch.device, dtype: torch.dtype) -> Strip:
    """Several tiles each way, none of them full, two prefixes that end within chunks, equal ids, hard negatives."""
    generator = torch.Generator().manual_seed(0)
    rows, first, own, hard, dims = 200, 30, 150, 140, (40, 100)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        embeddings = torch.randn(count, dims[-1], generator=generator).to(device, dtype)
        norms = torch.stack([embeddings[:, :dim].double().norm(dim=1) for dim in dims])
        return embeddings, norms.reciprocal()

    (queries, of_queries), (targets, of_targets), (negatives, of_negatives) = draw(rows), draw(own), draw(hard)
    return Strip(
        link="exp",
        dims=dims,
        margin=None,
        first=first,
        queries=queries,
        targets=targets,
        negatives=negatives,
        query_inverse_norm=of_queries,
        target_inverse_norm=of_targets,
        negative_inverse_norm=of_negatives,
        scale=torch.tensor(20.0, dtype=torch.float64, device=device),
        bias=torch.tensor(0.0, dtype=torch.float64, device=device),
        query_ids=torch.arange(rows, device=device) // 3,
        target_ids=torch.arange(rows, device=device) % 160,
        positive=torch.zeros_like(of_queries),
    )


def _results(tiles: ModuleType, strip: Strip) -> tuple[list[Tensor], list[Tensor]]:
    """Log sums and largest cosines; the gradients of a loss of both directions. All float64."""
    sums = tiles.strip_sums(strip, maxima=True)
    weights = torch.ones_like(sums.row), torch.ones_like(sums.column)
    reference = torch.full_like(sums.row[:, 0], 0.1)
    needs = Needs(True, True, True, True)
    gradients = tiles.strip_gradients(strip, weights[0], sums.row, weights[1], sums.column, reference, needs)
    return list(sums), [each.double() for each in gradients[:-1]]
