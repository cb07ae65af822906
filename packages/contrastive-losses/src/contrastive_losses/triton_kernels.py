"""The kernels of the strip for CUDA, in Triton. `triton_tiles` launches them; `strip` has the definitions.

One program computes one tile of logits for all prefixes: a single accumulator in float32 runs along the width, and
where a prefix ends an epilogue looks at it. What crosses tiles is written once per tile and added up in a fixed order
by whoever comes next, never by atomics, so the same inputs give the same bits.

Logits are in powers of 2 here: x = accumulator * row_factor * column_factor = l * log2(e). What is hidden in every
prefix (positives, equal ids, what lies outside the strip) starts with an accumulator of -inf, which no product changes,
so that the epilogues need no mask. For that the factors must be above 0, also those of zero prefixes.

Vectors over rows or columns are [P, whole tiles], padded with anything finite. Partial results are
[tiles across, P, whole tiles].
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton compiles these functions from their source and takes no types of Python's.

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # about the least float32; unlike -inf it can be subtracted from itself
# What is lost to underflow in a tile's sum of powers 2^(x - shift) is below 2^-119: nothing, for a sum above this.
SAFE_SUM = tl.constexpr(2.0**-90)
SIZES = ("row_count", "column_count", "diagonal")  # no new kernel for each batch size


@triton.jit
def _first_accumulator(
    rows, columns, row_count, column_count, diagonal, query_ids, own_query_ids, target_ids, own_target_ids,
    OF_TARGETS: tl.constexpr,
):  # fmt: skip
    """[M, N]: -inf where a logit is hidden in every prefix, else 0."""
    hidden = (rows >= row_count)[:, None] | (columns >= column_count)[None, :]
    if OF_TARGETS:
        hidden |= (rows + diagonal)[:, None] == columns[None, :]
        if query_ids is not None:
            hidden |= tl.load(query_ids + rows)[:, None] == tl.load(own_query_ids + columns)[None, :]
        if target_ids is not None:
            hidden |= tl.load(target_ids + rows)[:, None] == tl.load(own_target_ids + columns)[None, :]
    return tl.where(hidden, float("-inf"), 0.0)


@triton.jit
def _ended_prefix(chunk, ENDS: tl.constexpr):
    """The number of the prefix whose last chunk this is, or -1."""
    ended = -1
    for p in tl.static_range(len(ENDS)):
        ended = tl.where(chunk == ENDS[p] - 1, p, ended)
    return ended


@triton.jit
def _by_direction(x, row_limit, column_limit, of_row, of_column, OF_TARGETS: tl.constexpr):
    """x for the rows and x for the columns, which differ where there is a margin."""
    for_rows, for_columns = x, x
    if row_limit is not None:
        for_rows = tl.where(x > tl.load(row_limit + of_row)[:, None], float("-inf"), x)
        if OF_TARGETS:
            for_columns = tl.where(x > tl.load(column_limit + of_column)[None, :], float("-inf"), x)
    return for_rows, for_columns


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    queries, query_width, columns_of, column_width,  # embeddings, and the distance from row to row
    row_factor, row_limit, row_stride, column_factor, column_limit, column_stride,  # limits are for a margin, or None
    query_ids, own_query_ids, target_ids, own_target_ids,  # [rows], [columns] int64, or None
    row_count, column_count, diagonal,  # row i and column i + diagonal are a pair
    shift_at,  # powers are taken of x - shift where that is good
    row_sum, row_base, row_max, column_sum, column_base, column_max,  # partial results: sums are sum * 2^base
    ENDS: tl.constexpr,  # [P] the chunk after each prefix
    OF_TARGETS: tl.constexpr,  # else hard negatives: no pairs, no ids, no columns' sums
    MAXIMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of powers over the rows and the columns of each tile."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    rows, columns = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = _first_accumulator(
        rows, columns, row_count, column_count, diagonal, query_ids, own_query_ids, target_ids, own_target_ids,
        OF_TARGETS,
    )  # fmt: skip
    shift = tl.load(shift_at)
    within = tl.arange(0, BLOCK_K)
    # What lies outside the strip is hidden already; reading the last row again for it needs no mask.
    left_at = queries + tl.minimum(rows, row_count - 1).to(tl.int64)[:, None] * query_width + within[None, :]
    right_at = columns_of + tl.minimum(columns, column_count - 1).to(tl.int64)[None, :] * column_width
    right_at += within[:, None]
    for chunk in range(ENDS[len(ENDS) - 1]):
        left, right = tl.load(left_at), tl.load(right_at)
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
        left_at += BLOCK_K
        right_at += BLOCK_K
        p = _ended_prefix(chunk, ENDS)
        if p >= 0:
            of_row, of_column = p * row_stride + rows, p * column_stride + columns
            row_factors = tl.load(row_factor + of_row)[:, None]
            column_factors = tl.load(column_factor + of_column)[None, :]
            x = accumulator * row_factors * column_factors
            for_rows, for_columns = _by_direction(x, row_limit, column_limit, of_row, of_column, OF_TARGETS)
            row_at = (column_tile * len(ENDS) + p) * tl.num_programs(0) * BLOCK_M + rows
            column_at = (row_tile * len(ENDS) + p) * tl.num_programs(1) * BLOCK_N + columns
            if MAXIMA:
                tl.store(row_max + row_at, tl.max(for_rows, 1))
                if OF_TARGETS:
                    tl.store(column_max + column_at, tl.max(for_columns, 0))

            power = tl.exp2(for_rows - shift)
            sum_of_rows = tl.sum(power, 1)
            base_of_rows = tl.zeros_like(sum_of_rows) + shift
            least = tl.min(sum_of_rows)
            if OF_TARGETS:
                if row_limit is not None:
                    power = tl.exp2(for_columns - shift)
                sum_of_columns = tl.sum(power, 0)
                base_of_columns = tl.zeros_like(sum_of_columns) + shift
                least = tl.minimum(least, tl.min(sum_of_columns))
            if least < SAFE_SUM:
                # Computed again, since keeping it for this rare case costs registers, and in another order, since the
                # compiler would keep it otherwise.
                x = accumulator * (row_factors * column_factors)
                for_rows, for_columns = _by_direction(x, row_limit, column_limit, of_row, of_column, OF_TARGETS)
                base_of_rows = tl.maximum(tl.max(for_rows, 1), LOWEST)
                sum_of_rows = tl.sum(tl.exp2(for_rows - base_of_rows[:, None]), 1)
                if OF_TARGETS:
                    base_of_columns = tl.maximum(tl.max(for_columns, 0), LOWEST)
                    sum_of_columns = tl.sum(tl.exp2(for_columns - base_of_columns[None, :]), 0)
            tl.store(row_sum + row_at, sum_of_rows)
            tl.store(row_base + row_at, base_of_rows)
            if OF_TARGETS:
                tl.store(column_sum + column_at, sum_of_columns)
                tl.store(column_base + column_at, base_of_columns)


@triton.jit(do_not_specialize=["tiles", "count"])
def combine_kernel(sums, bases, tiles, count, result, BLOCK_TILES: tl.constexpr, BLOCK: tl.constexpr):
    """result[e] = log2 of the sum over tiles t of sums[t, e] * 2^bases[t, e], in float64 and in the order of t."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    base = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        at = tile[:, None] * count + entries[None, :]
        part = tl.load(sums + at, (tile < tiles)[:, None], 0.0)
        part_base = tl.load(bases + at, (tile < tiles)[:, None], LOWEST)
        greatest = tl.maximum(base, tl.max(part_base, 0))
        part = part.to(tl.float64) * tl.exp2(part_base - greatest[None, :]).to(tl.float64)
        total = total * tl.exp2(base - greatest).to(tl.float64) + tl.sum(part, 0)
        base = greatest
    tl.store(result + entries, base.to(tl.float64) + tl.log2(total))


@triton.jit(do_not_specialize=SIZES)
def derivative_kernel(
    queries, query_width, columns_of, column_width,
    row_factor, row_limit, row_stride, column_factor, column_limit, column_stride,
    query_ids, own_query_ids, target_ids, own_target_ids,
    row_count, column_count, diagonal,
    row_weight, row_log_sum, column_weight, column_log_sum,  # weights times ln(2), log sums to base 2
    reference,  # [P] times scale and log2(e), or None
    derivative,  # [P, whole tiles of rows, whole tiles of columns], or None
    row_moment, column_moment,  # partial results
    row_centred,  # partial results, or None
    ENDS: tl.constexpr,
    OF_TARGETS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For each prefix the sum of H over it and the longer ones, the moments, and the sums of G * (x - reference)."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    rows, columns = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = _first_accumulator(
        rows, columns, row_count, column_count, diagonal, query_ids, own_query_ids, target_ids, own_target_ids,
        OF_TARGETS,
    )  # fmt: skip
    within = tl.arange(0, BLOCK_K)
    left_at = queries + tl.minimum(rows, row_count - 1).to(tl.int64)[:, None] * query_width + within[None, :]
    right_at = columns_of + tl.minimum(columns, column_count - 1).to(tl.int64)[None, :] * column_width
    right_at += within[:, None]
    if derivative is not None:
        width = tl.num_programs(1) * BLOCK_N
        tile_at = derivative + rows[:, None] * width + columns[None, :]
        of_prefix = tl.num_programs(0) * BLOCK_M * width
    for chunk in range(ENDS[len(ENDS) - 1]):
        left, right = tl.load(left_at), tl.load(right_at)
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
        left_at += BLOCK_K
        right_at += BLOCK_K
        p = _ended_prefix(chunk, ENDS)
        if p >= 0:
            of_row, of_column = p * row_stride + rows, p * column_stride + columns
            row_factors = tl.load(row_factor + of_row)[:, None]
            column_factors = tl.load(column_factor + of_column)[None, :]
            x = accumulator * row_factors * column_factors
            for_rows, for_columns = _by_direction(x, row_limit, column_limit, of_row, of_column, OF_TARGETS)
            g = tl.exp2(for_rows - tl.load(row_log_sum + of_row)[:, None]) * tl.load(row_weight + of_row)[:, None]
            if OF_TARGETS:
                power = tl.exp2(for_columns - tl.load(column_log_sum + of_column)[None, :])
                g += power * tl.load(column_weight + of_column)[None, :]
            row_at = (column_tile * len(ENDS) + p) * tl.num_programs(0) * BLOCK_M + rows
            if reference is not None:  # before the rest, which then has the logits' registers
                centred = g * (tl.maximum(x, LOWEST) - tl.load(reference + p))
                tl.store(row_centred + row_at, tl.sum(centred, 1))
            row_factors = tl.load(row_factor + of_row)[:, None]  # again: kept all the while, they would spill
            column_factors = tl.load(column_factor + of_column)[None, :]
            h = g * row_factors * column_factors
            if derivative is not None:
                tl.store(tile_at + p * of_prefix, h.to(derivative.dtype.element_ty))
            moment = h * tl.maximum(accumulator, LOWEST)  # G * l; 0 where hidden, not 0 * -inf
            column_at = (row_tile * len(ENDS) + p) * tl.num_programs(1) * BLOCK_N + columns
            tl.store(row_moment + row_at, tl.sum(moment, 1))
            tl.store(column_moment + column_at, tl.sum(moment, 0))
    if derivative is not None and len(ENDS) > 1:
        # Logits come in the order of the prefixes, suffix sums are taken in the reverse one. The tile is still in the
        # cache. One thread may read here what another has written.
        tl.debug_barrier()
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for back in tl.static_range(len(ENDS)):
            at = tile_at + (len(ENDS) - 1 - back) * of_prefix
            total += tl.load(at).to(tl.float32)
            if back > 0:
                tl.store(at, total.to(derivative.dtype.element_ty))
