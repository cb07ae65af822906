"""The strip for CUDA: panels of rows and columns, one kernel launch for each. `strip` has the definitions,
`triton_kernels` what happens within a tile.

In the forward pass a kernel writes for each tile the sums of its rows and of its columns, relative to their own power
of 2 if a common one would lose digits, so they are correct at every scale. They are combined in float64, in a fixed
order.

In the backward pass a kernel writes the suffix sums of H of a panel, in bfloat16 if the embeddings have 16 bits, else
in float32; ordinary matrix products do the rest. The host never waits.
"""

import torch
from torch import Tensor

from contrastive_losses import triton_kernels
from contrastive_losses.strip import LOG2E, Gradients, Needs, Strip, Sums, blocks, logit_dtype, split_exponent
from contrastive_losses.triton_panels import Panel, Panels

SHARED_TOP = 110.0  # x - shift stays below this, so that no sum over a tile overflows in float32
PARTIAL_BYTES = 64 * 2**20  # memory of one launch, whatever the batch: for partial sums …
DERIVATIVE_BYTES = 512 * 2**20  # … and for H, where larger matrix products run nearer to the peak


def supports(strip: Strip) -> bool:
    """Whether the kernels can compute this strip, on a GPU that can run them. `torch_tiles` computes any."""
    if not strip.queries.is_cuda or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(strip.queries.device) < (8, 0):
        return False
    return strip.link == "exp" and logit_dtype(strip) == torch.float32


def strip_sums(strip: Strip, *, maxima: bool) -> Sums:
    """See `strip`."""
    panels = Panels(strip)
    row, column = (torch.full_like(norm, -torch.inf) for norm in (strip.query_inverse_norm, strip.target_inverse_norm))
    row_max, column_max = row.clone(), column.clone()
    shift = (LOG2E * strip.scale - SHARED_TOP).clamp_min(0.0).float()  # no cosine exceeds 1 but for rounding
    bytes_of_a_logit = 24 * len(strip.dims) / panels.shape.tile  # sum, base and maximum, of rows and of columns
    for panel in panels.walk(int(PARTIAL_BYTES / bytes_of_a_logit)):
        each = 3 if maxima else 2
        of_rows = [panel.row_partials() for _ in range(each)]
        of_columns = [panel.column_partials() for _ in range(each if panel.of_targets else 0)]
        partials = [*of_rows, *[None] * (3 - len(of_rows)), *of_columns, *[None] * (3 - len(of_columns))]
        panel.launch(triton_kernels.sums_kernel, shift, *partials, MAXIMA=maxima)

        sides = [(row[:, panel.rows], row_max[:, panel.rows], of_rows)]
        if panel.of_targets:
            sides.append((column[:, panel.columns], column_max[:, panel.columns], of_columns))
        for log_sum, greatest, (part, base, *part_max) in sides:
            count = log_sum.shape[1]
            log_sum.copy_(torch.logaddexp2(log_sum, _combined(part, base)[:, :count]))
            if maxima:
                greatest.copy_(torch.maximum(greatest, part_max[0].amax(0)[:, :count].double()))
    if not maxima:
        return Sums(row / LOG2E, column / LOG2E, None, None)
    unit = LOG2E * strip.scale
    return Sums(row / LOG2E, column / LOG2E, row_max / unit, column_max / unit)


def _combined(part: Tensor, base: Tensor) -> Tensor:
    """log2 of the sum over tiles of part * 2^base: `[tiles, P, n]` -> `[P, n]` float64."""
    tiles, prefixes, count = part.shape
    result = part.new_empty(prefixes, count, dtype=torch.float64)
    block = 64  # divides every tile
    with torch.cuda.device(part.get_device()):
        triton_kernels.combine_kernel[(prefixes * count // block,)](
            part, base, tiles, prefixes * count, result, BLOCK_TILES=32, BLOCK=block, enable_fp_fusion=True
        )
    return result


def strip_gradients(
    strip: Strip,
    row_weight: Tensor,
    row_log_sum: Tensor,
    column_weight: Tensor,
    column_log_sum: Tensor,
    reference: Tensor,
    needs: Needs,
) -> Gradients:
    """See `strip`."""
    panels = Panels(strip)
    row_vectors = _vectors(panels, row_weight, row_log_sum)
    column_vectors = _vectors(panels, column_weight, column_log_sum)
    reference = (LOG2E * strip.scale * reference).float()
    centred = torch.zeros_like(strip.scale)
    norms = (strip.query_inverse_norm, strip.target_inverse_norm, strip.negative_inverse_norm)
    row_moment, target_moment, negative_moment = map(torch.zeros_like, norms)
    of_queries, of_targets, of_negatives = (
        torch.zeros(rows.shape, dtype=torch.float32, device=rows.device) if wanted else None
        for rows, wanted in zip((strip.queries, strip.targets, strip.negatives), needs[:3], strict=True)
    )
    sides = (of_negatives, negative_moment), (of_targets, target_moment)
    dtype = torch.float32 if panels.dtype == torch.float32 else torch.bfloat16  # float16 could not hold the smallest H
    for panel in panels.walk(DERIVATIVE_BYTES // (dtype.itemsize * len(strip.dims))):
        of_columns, column_moment = sides[panel.of_targets]
        shape = len(strip.dims), panel.padded_height, panel.padded_width
        h = row_weight.new_empty(shape, dtype=dtype) if of_queries is not None or of_columns is not None else None
        row_moments, column_moments = panel.row_partials(), panel.column_partials()
        row_centred = panel.row_partials() if needs.scale else None
        panel.launch(
            triton_kernels.derivative_kernel,
            *map(panel.from_rows, row_vectors),
            *(map(panel.from_columns, column_vectors) if panel.of_targets else (None, None)),
            reference if needs.scale else None,
            h,
            row_moments,
            column_moments,
            row_centred,
        )
        row_moment[:, panel.rows] += row_moments.sum(0, dtype=torch.float64)[:, : panel.height]
        column_moment[:, panel.columns] += column_moments.sum(0, dtype=torch.float64)[:, : panel.width]
        if row_centred is not None:
            centred += row_centred[:, :, : panel.height].sum(dtype=torch.float64)
        if h is not None:
            _add_products(strip, panel, h, of_queries, of_columns)
    for gradient, inverse_norm in zip((of_queries, of_targets, of_negatives), norms, strict=True):
        if gradient is not None:  # the kernels' SMALLEST_FACTOR leaves tiny values in zero rows, which must be 0
            gradient.masked_fill_((inverse_norm[-1] == 0)[:, None], 0.0)
    moments = row_moment, target_moment, negative_moment
    return Gradients(of_queries, of_targets, of_negatives, *moments, centred, torch.zeros_like(strip.scale))


def _vectors(panels: Panels, weight: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log sums as the kernels take them, see `split_exponent`."""
    shift, rest = split_exponent(log_sum * LOG2E, torch.float32)
    return panels.vector(weight * rest / LOG2E), panels.vector(shift)


def _add_products(strip: Strip, panel: Panel, h: Tensor, of_queries: Tensor | None, of_columns: Tensor | None) -> None:
    """Adds a panel's H times the embeddings of the other side, block by block."""
    columns_of = strip.targets if panel.of_targets else strip.negatives
    queries, columns = strip.queries[panel.rows].to(h.dtype), columns_of[panel.columns].to(h.dtype)
    for p, block in enumerate(blocks(strip.dims)):
        of_block = h[p, : panel.height, : panel.width]
        if of_queries is not None:
            _add_product(of_queries[panel.rows, block], of_block, columns[:, block])
        if of_columns is not None:
            _add_product(of_columns[panel.columns, block], of_block.T, queries[:, block])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in float32."""
    if left.is_cuda and left.dtype != torch.float32:
        total.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:  # 16 bits get here only from Triton's interpreter
        total.addmm_(left.float(), right.float())
