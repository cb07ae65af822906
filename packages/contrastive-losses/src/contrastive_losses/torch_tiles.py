"""The strip in plain torch, tile by tile, on any device. `strip` has the definitions.

Prefixes nest: the raw products of a prefix are those of the one before plus one block of columns, so all prefixes cost
one product of the full width. Both directions take their sums from the same tile. The backward pass computes the tiles
again; the derivative by block k of a row is the sum of H over all prefixes that contain block k, times block k of the
other side, so suffix sums over the prefixes make it one product of the full width for each side.

Exponentials are powers of 2, which a CPU computes twice as fast as those of e, in one of two ways. *Shared*: one power
2^(x - shift), x = l * log2(e), serves rows and columns. It is valid while nothing that matters overflows or underflows;
the range of float32 suffices at every scale up to 100 unless all cosines of a row, its positive's included, lie below
some negative bound (-0.1 at scale 100, -0.5 at 50). *Separate*: powers relative to the maximum of each row and of each
column, always valid. On the CPU the sums themselves show whether the shared way was valid. On other devices the host
would have to wait for them, so these always take the separate way; so does a margin, which hides different logits in
the two directions.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_losses.strip import LOG2E, Gradients, Needs, Strip, Sums, blocks, factors, logit_dtype, split_exponent

LONGEST_SUM = 128  # terms of a product that a CPU adds at a time
CPU_TILE = (512, 512)  # the tile of all prefixes, 6 MiB in float32 for six, stays in the last-level cache
OTHER_TILE = (2048, 4096)  # large enough that launching kernels takes less time than running them


class _Window(NamedTuple):
    """The range in which one shared power of 2 is valid in some dtype, in powers of 2."""

    top: float  # x - shift stays below this: a tile's sum of such powers is still finite
    bottom: float  # each row and column must hold something above shift - bottom, which is far above what underflows
    limit: float  # up to this scale * log2(e) sharing is tried


_WINDOWS = {torch.float32: _Window(115.0, 40.0, 150.0), torch.float64: _Window(900.0, 400.0, 900.0)}


def strip_sums(strip: Strip, *, maxima: bool) -> Sums:
    """See `strip`."""
    shift = _shared_shift(strip)
    if shift is not None:
        sums = _sums(strip, shift, maxima)
        positive = strip.scale * strip.positive
        own = positive[:, strip.first : strip.first + len(strip.targets)]
        of_rows = positive[:, : len(strip.queries)]
        if _is_within_window(strip, shift, torch.logaddexp(of_rows, sums.row), torch.logaddexp(own, sums.column)):
            return sums
    return _sums(strip, None, maxima)


def _shared_shift(strip: Strip) -> float | None:
    """The shift of a shared power of 2 that may be valid for this strip, or None."""
    if strip.link != "exp" or strip.margin is not None or strip.queries.device.type != "cpu":
        return None
    top, _, limit = _WINDOWS[logit_dtype(strip)]
    largest = float(strip.scale) * LOG2E
    if largest > limit:
        return None
    # The larger the shift, the less rounding. At 50 below the least positive, all rows and columns are in the window,
    # and no negative above 2^-170 of its positive is lost. Whole numbers are exact in float32.
    least = float((strip.scale * LOG2E * strip.positive).min().sub(50.0).floor())
    return max(0.0, float(math.ceil(largest - top)), least)  # in this order, which ignores a nan


def _is_within_window(strip: Strip, shift: float, *log_sums: Tensor) -> bool:
    """Whether every row and column, positives included, holds enough for a shared power of 2. Not if there is a nan."""
    floor = (shift - _WINDOWS[logit_dtype(strip)].bottom) / LOG2E
    return all(bool((each >= floor).all()) for each in log_sums)


class _Tiles:
    """Walks over the tiles of a strip and computes the logits of each, prefix after prefix, in buffers of its own.

    Logits come in the unit and with the offset in which they are used: x = unit * l + offset, -inf where hidden.
    """

    def __init__(self, strip: Strip, unit: float, offset: Tensor) -> None:
        self.strip, self.unit, self.offset = strip, unit, offset
        self.dtype, self.device = logit_dtype(strip), strip.queries.device
        self.blocks = blocks(strip.dims)
        self.row_factor, self.target_factor, self.negative_factor = factors(strip, unit)
        tile = CPU_TILE if self.device.type == "cpu" else OTHER_TILE
        self.height = min(tile[0], len(strip.queries))
        self.width = min(tile[1], max(len(strip.targets), len(strip.negatives)))
        self.flat_products, self.flat_logits = self.buffer(), self.buffer()

    def buffer(self, *leading: int) -> Tensor:
        return torch.empty(*leading, self.height * self.width, dtype=self.dtype, device=self.device)

    def view(self, buffer: Tensor) -> Tensor:
        """The front of a `buffer` in the shape of the present tile, `[…, r, c]` and contiguous in its last two dims."""
        height, width = self.row_panel.shape[0], self.column_panel.shape[0]
        return torch.unflatten(buffer[..., : height * width], -1, (height, width))

    def __iter__(self) -> Iterator[tuple[slice, slice, bool]]:
        """Rows, columns, and whether the columns are targets (else hard negatives), of one tile after the other."""
        for rows in _panels(len(self.strip.queries), self.height):
            self.row_panel = self.strip.queries[rows].to(self.dtype)  # no copy if it has this dtype
            for of_targets in (True, False):
                columns_of = self.strip.targets if of_targets else self.strip.negatives
                self.column_factor = self.target_factor if of_targets else self.negative_factor
                for columns in _panels(len(columns_of), self.width):
                    self.column_panel = columns_of[columns].to(self.dtype)
                    self.rows, self.columns, self.of_targets = rows, columns, of_targets
                    self.same = self._same_ids() if of_targets else None
                    self.products = self.view(self.flat_products).zero_()
                    yield rows, columns, of_targets

    def logits(self, p: int) -> Tensor:
        """`[r, c]` of the present tile; to be asked for p = 0, 1, … in this order. `products` are then those of p."""
        block = self.blocks[p]
        # The shortest prefix has the greatest cosines among its negatives, whose errors weigh most.
        longest = -(-self.strip.dims[0] // 2) if p == 0 else LONGEST_SUM
        _add_product(self.products, self.row_panel[:, block], self.column_panel[:, block].T, longest)
        logits = torch.mul(self.products, self.row_factor[p, self.rows, None], out=self.view(self.flat_logits))
        torch.addcmul(self.offset, logits, self.column_factor[p, self.columns], out=logits)
        if self.of_targets:
            if self.same is not None:
                logits.masked_fill_(self.same, -torch.inf)
            diagonal = self.rows.start - (self.strip.first + self.columns.start)
            if -logits.shape[0] < diagonal < logits.shape[1]:
                logits.diagonal(diagonal).fill_(-torch.inf)
        return logits

    def by_direction(self, p: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What counts for rows and what counts for columns; the same tensor twice unless there is a margin."""
        if self.strip.margin is None:
            return logits, logits
        limit = self.unit * self.strip.scale * (self.strip.positive[p] + self.strip.margin)
        limit = limit.to(self.dtype) + self.offset
        for_rows = logits.masked_fill(logits > limit[self.rows, None], -torch.inf)
        if not self.of_targets:
            return for_rows, logits
        own = slice(self.strip.first + self.columns.start, self.strip.first + self.columns.stop)
        return for_rows, logits.masked_fill(logits > limit[own], -torch.inf)

    def _same_ids(self) -> Tensor | None:
        own = slice(self.strip.first + self.columns.start, self.strip.first + self.columns.stop)
        same = None
        for ids in (self.strip.query_ids, self.strip.target_ids):
            if ids is not None:
                equal = ids[self.rows, None] == ids[own]
                same = equal if same is None else same.logical_or_(equal)
        if same is not None and self.device.type == "cpu" and not same.any():
            return None  # most tiles; on other devices the host would wait
        return same


def _add_product(total: Tensor, left: Tensor, right: Tensor, longest: int) -> None:
    """total += left @ right, in place. A long sum has more error than a few short ones: on the CPU at most `longest`
    terms are added at a time, which costs hardly any speed."""
    count = -(-left.shape[1] // longest) if total.device.type == "cpu" else 1
    for some, others in zip(left.chunk(count, 1), right.chunk(count, 0), strict=True):
        total.addmm_(some, others)


def _panels(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, max(step, 1)):
        yield slice(start, min(start + step, size))


def _tiles_of(strip: Strip, shift: float | None) -> _Tiles:
    if strip.link == "sigmoid":
        return _Tiles(strip, 1.0, strip.bias.to(logit_dtype(strip)))
    return _Tiles(strip, LOG2E, torch.full_like(strip.bias, -(shift or 0.0), dtype=logit_dtype(strip)))


def _sums(strip: Strip, shift: float | None, maxima: bool) -> Sums:
    tiles = _tiles_of(strip, shift)
    separate = strip.link == "exp" and shift is None
    row, column = torch.zeros_like(strip.query_inverse_norm), torch.zeros_like(strip.target_inverse_norm)
    row_max, column_max = torch.full_like(row, -torch.inf), torch.full_like(column, -torch.inf)
    if separate:  # then these are logarithms
        row, column = row_max.clone(), column_max.clone()
    spare = tiles.buffer()
    for rows, columns, of_targets in tiles:
        for p in range(len(strip.dims)):
            for_rows, for_columns = tiles.by_direction(p, tiles.logits(p))
            if maxima:
                row_max[p, rows] = torch.maximum(row_max[p, rows], for_rows.amax(1))
                if of_targets:
                    column_max[p, columns] = torch.maximum(column_max[p, columns], for_columns.amax(0))
            if strip.link == "sigmoid":
                row[p, rows] += F.softplus(for_rows, threshold=50).sum(1)
            elif separate:
                _add_log2_sum(row[p, rows], for_rows, 1, tiles.view(spare))
                if of_targets:
                    _add_log2_sum(column[p, columns], for_columns, 0, tiles.view(spare))
            else:
                powers = for_rows.exp2_()
                row[p, rows] += powers.sum(1)
                if of_targets:
                    column[p, columns] += powers.sum(0)
    if strip.link == "exp":
        row, column = ((each if separate else each.log2_() + (shift or 0.0)) / LOG2E for each in (row, column))
    if not maxima:
        return Sums(row, column, None, None)
    row_max, column_max = ((each - tiles.offset) / (tiles.unit * strip.scale) for each in (row_max, column_max))
    return Sums(row, column, row_max, column_max)


def _add_log2_sum(total: Tensor, logits: Tensor, dim: int, spare: Tensor) -> None:
    """total = log2(2^total + the sum of 2^logits over `dim`), in place, without leaving the range of the dtype."""
    maximum = logits.amax(dim, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)  # -inf - -inf would be nan
    powers = torch.sub(logits, maximum, out=spare).exp2_().sum(dim)
    torch.logaddexp2(total, maximum.squeeze(dim).double() + powers.double().log2_(), out=total)


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
    shift = _shared_shift(strip)
    if shift is not None and not _is_within_window(strip, shift, row_log_sum, column_log_sum):
        shift = None
    tiles = _tiles_of(strip, shift)
    derivative = _Derivative(tiles, shift, row_weight, row_log_sum, column_weight, column_log_sum)
    h_buffer, moment_buffer = tiles.buffer(len(strip.dims)), tiles.buffer()

    def product(wanted: bool, like: Tensor) -> Tensor | None:
        return torch.zeros(like.shape, dtype=tiles.dtype, device=tiles.device) if wanted else None

    of_queries = product(needs.queries, strip.queries)
    of_targets, of_negatives = product(needs.targets, strip.targets), product(needs.negatives, strip.negatives)
    norms = (strip.query_inverse_norm, strip.target_inverse_norm, strip.negative_inverse_norm)
    row_moment, target_moment, negative_moment = (torch.zeros_like(each) for each in norms)
    row_length, target_length, negative_length = _lengths(norms, reference, tiles.dtype)
    centred = torch.zeros_like(strip.scale)
    sides = (of_negatives, negative_moment, negative_length), (of_targets, target_moment, target_length)

    for rows, columns, are_targets in tiles:
        of_columns, column_moment, column_length = sides[are_targets]
        h = tiles.view(h_buffer)
        for p in range(len(strip.dims)):
            derivative.of_products(p, tiles.logits(p), out=h[p])
            moment = torch.mul(h[p], tiles.products, out=tiles.view(moment_buffer))
            row_moment[p, rows] += moment.sum(1)
            column_moment[p, columns] += moment.sum(0)
            if needs.scale:
                across = column_length[p, columns]
                torch.addcmul(tiles.products, row_length[p, rows, None], across, value=-1, out=moment)
                centred += moment.mul_(h[p]).sum()
        for p in reversed(range(len(strip.dims) - 1)):
            h[p] += h[p + 1]
        for p, block in enumerate(tiles.blocks):
            if of_queries is not None:
                _add_product(of_queries[rows, block], h[p], tiles.column_panel[:, block], LONGEST_SUM)
            if of_columns is not None:
                _add_product(of_columns[columns, block], h[p].T, tiles.row_panel[:, block], LONGEST_SUM)
    moments = row_moment, target_moment, negative_moment
    return Gradients(of_queries, of_targets, of_negatives, *moments, centred, derivative.total)


def _lengths(inverse_norms: tuple[Tensor, ...], reference: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Lengths of the rows; one of a query times one of a column is the raw product of a cosine that equals the
    reference."""
    lengths = [torch.where(each == 0, 0.0, each.reciprocal()) for each in inverse_norms]
    lengths[0].mul_(reference[:, None])
    return [each.to(dtype) for each in lengths]


class _Derivative:
    """H of a tile from its logits; weights, factors and the rest of the log sums are combined into few vectors."""

    def __init__(
        self,
        tiles: _Tiles,
        shift: float | None,
        row_weight: Tensor,
        row_log_sum: Tensor,
        column_weight: Tensor,
        column_log_sum: Tensor,
    ) -> None:
        strip, dtype = tiles.strip, tiles.dtype
        self.tiles, self.row_weight = tiles, row_weight
        self.total = torch.zeros((), dtype=torch.float64, device=tiles.device)
        row_factor = strip.scale * strip.query_inverse_norm
        if strip.link == "sigmoid":
            self.way = "sigmoid"
            self.row = (row_weight * row_factor).to(dtype)
            return
        if shift is None:
            self.way = "separate"
            self.row_shift, row_rest = split_exponent(LOG2E * row_log_sum, dtype)
            self.column_shift, column_rest = split_exponent(LOG2E * column_log_sum, dtype)
            self.row, self.row_factor = (row_weight * row_rest * row_factor).to(dtype), row_factor.to(dtype)
            self.column = (column_weight * column_rest * strip.target_inverse_norm).to(dtype)
            self.spare = tiles.buffer()
        else:  # H = 2^(x - shift) * (rows' part * column factor + row factor * columns' part): a product of rank two
            self.way = "shared"
            rows = row_weight * torch.exp2(shift - LOG2E * row_log_sum)
            columns = column_weight * torch.exp2(shift - LOG2E * column_log_sum) * strip.target_inverse_norm
            self.rows = torch.stack([rows * row_factor, row_factor], dim=-1).to(dtype)
            self.columns = torch.stack([strip.target_inverse_norm, columns], dim=1).to(dtype)

    def of_products(self, p: int, logits: Tensor, out: Tensor) -> None:
        """H of prefix p of the present tile into `out`; uses up `logits`."""
        {"shared": self._shared, "separate": self._separate, "sigmoid": self._sigmoid}[self.way](p, logits, out)

    def _shared(self, p: int, logits: Tensor, out: Tensor) -> None:
        tiles = self.tiles
        if tiles.of_targets:
            torch.mm(self.rows[p, tiles.rows], self.columns[p][:, tiles.columns], out=out)
        else:
            torch.mul(self.rows[p, tiles.rows, :1], tiles.column_factor[p, tiles.columns], out=out)
        out.mul_(logits.exp2_())

    def _separate(self, p: int, logits: Tensor, out: Tensor) -> None:
        tiles = self.tiles
        for_rows, for_columns = tiles.by_direction(p, logits)
        torch.sub(for_rows, self.row_shift[p, tiles.rows, None], out=out).exp2_()
        out.mul_(self.row[p, tiles.rows, None]).mul_(tiles.column_factor[p, tiles.columns])
        if tiles.of_targets:
            spare = torch.sub(for_columns, self.column_shift[p, tiles.columns], out=tiles.view(self.spare)).exp2_()
            out.add_(spare.mul_(self.column[p, tiles.columns]).mul_(self.row_factor[p, tiles.rows, None]))

    def _sigmoid(self, p: int, logits: Tensor, out: Tensor) -> None:
        tiles = self.tiles
        for_rows, _ = tiles.by_direction(p, logits)
        torch.sigmoid(for_rows, out=out)
        self.total += (self.row_weight[p, tiles.rows] * out.sum(1)).sum()
        out.mul_(self.row[p, tiles.rows, None]).mul_(tiles.column_factor[p, tiles.columns])
