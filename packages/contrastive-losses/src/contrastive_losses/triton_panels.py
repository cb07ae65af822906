"""A strip as the Triton kernels want it: laid out in whole tiles and chunks, and walked panel by panel."""

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_losses.strip import LOG2E, Strip, factors

SMALLEST_FACTOR = 1e-30  # stands for 0: the kernels want factors above 0, and this times anything is nothing


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    tile: int  # logits, in both directions
    chunk: int  # of the width, at a time
    warps: int
    stages: int  # chunks on their way from memory at once


# The largest tiles whose registers suffice; `test_triton_compiles` asks the compiler.
SHAPES = {"16 bits": Shape(128, 64, 8, 3), "tf32": Shape(128, 32, 8, 3), "ieee": Shape(64, 32, 4, 2)}
FEW_STAGES_BELOW = 160 * 2**10  # bytes of shared memory: consumer cards have 99 KiB, data centre ones 163 and more


class Panels:
    """A strip in the layout of the kernels. Embeddings, factors and ids are here; other vectors come from `vector`."""

    def __init__(self, strip: Strip) -> None:
        self.strip = strip
        self.dtype = torch.promote_types(strip.queries.dtype, strip.targets.dtype)
        self.dtype = torch.promote_types(self.dtype, strip.negatives.dtype)
        self.precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
        self.shape = SHAPES["16 bits" if self.dtype.itemsize == 2 else self.precision]
        device = strip.queries.device
        if device.type == "cuda":
            shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
            if shared_memory < FEW_STAGES_BELOW:
                self.shape = self.shape._replace(stages=2)

        blocks = zip((0, *strip.dims), strip.dims, strict=False)
        self.ends = tuple(accumulate(-(-(high - low) // self.shape.chunk) for low, high in blocks))
        self.queries, self.targets, self.negatives = (
            self._chunked(rows) for rows in (strip.queries, strip.targets, strip.negatives)
        )
        self.row_factor, self.target_factor, self.negative_factor = (
            self.vector(each.clamp_min(SMALLEST_FACTOR)) for each in factors(strip, LOG2E)
        )
        own = slice(strip.first, strip.first + len(strip.targets))
        self.row_limit = self.column_limit = None
        if strip.margin is not None:
            limit = LOG2E * strip.scale * (strip.positive + strip.margin)
            self.row_limit, self.column_limit = self.vector(limit[:, : len(strip.queries)]), self.vector(limit[:, own])
        self.ids = [
            None if ids is None else (self._whole_tiles(ids), self._whole_tiles(ids[own]))
            for ids in (strip.query_ids, strip.target_ids)
        ]

    def vector(self, values: Tensor) -> Tensor:
        """`[P, n]` in float32 and whole tiles."""
        return self._whole_tiles(values.float())

    def _whole_tiles(self, values: Tensor) -> Tensor:
        return F.pad(values, (0, -values.shape[-1] % self.shape.tile), value=1).contiguous()

    def _chunked(self, rows: Tensor) -> Tensor:
        """`[n, K]` in the common dtype, where each prefix ends with a chunk: the rows themselves if they are so, and
        aligned for wide loads, else a copy with zeros in between."""
        chunk, dims = self.shape.chunk, self.strip.dims
        aligned = rows.stride(1) == 1 and rows.stride(0) % 16 == 0 and rows.data_ptr() % 16 == 0
        if aligned and rows.dtype == self.dtype and all(dim % chunk == 0 for dim in dims):
            return rows
        copy = rows.new_zeros(len(rows), self.ends[-1] * chunk, dtype=self.dtype)
        for low, high, start in zip((0, *dims), dims, (0, *self.ends), strict=False):
            copy[:, start * chunk : start * chunk + high - low] = rows[:, low:high]
        return copy

    def walk(self, area: int) -> Iterator["Panel"]:
        """All logits, in panels of about `area` of them; targets first."""
        height = len(self.queries)
        for of_targets, width in ((True, len(self.targets)), (False, len(self.negatives))):
            for columns in self._split(width, max(math.isqrt(area), area // max(height, 1))):
                for rows in self._split(height, area // (columns.stop - columns.start)):
                    yield Panel(self, of_targets, rows, columns)

    def _split(self, size: int, step: int) -> Iterator[slice]:
        """Slices of nearly equal size, of whole tiles but for the last."""
        tile = self.shape.tile
        count = -(-size // max(step // tile * tile, tile))
        step = -(-size // (max(count, 1) * tile)) * tile
        for start in range(0, size, max(step, tile)):
            yield slice(start, min(start + step, size))


class Panel:
    """Some rows against some columns: what one launch computes."""

    def __init__(self, panels: Panels, of_targets: bool, rows: slice, columns: slice) -> None:
        self.panels, self.of_targets, self.rows, self.columns = panels, of_targets, rows, columns
        self.height, self.width = rows.stop - rows.start, columns.stop - columns.start
        tile = panels.shape.tile
        self.grid = (-(-self.height // tile), -(-self.width // tile))
        self.padded_height, self.padded_width = self.grid[0] * tile, self.grid[1] * tile

    def row_partials(self) -> Tensor:
        """One number for each row, prefix, and tile across: `[column tiles, P, whole tiles]` float32."""
        return self.panels.row_factor.new_empty(self.grid[1], len(self.panels.ends), self.padded_height)

    def column_partials(self) -> Tensor:
        return self.panels.row_factor.new_empty(self.grid[0], len(self.panels.ends), self.padded_width)

    def launch(self, kernel: Any, *arguments: Tensor | int | None, **constants: Any) -> None:
        """Runs a kernel over the tiles; `arguments` are those that come after what all kernels take."""
        panels, first = self.panels, self.panels.strip.first
        columns_of, column_factor, column_limit, ids = (
            (panels.targets, panels.target_factor, panels.column_limit, panels.ids)
            if self.of_targets
            else (panels.negatives, panels.negative_factor, None, [None, None])
        )
        pairs_of_ids = (
            (None, None) if each is None else (each[0][self.rows.start :], each[1][self.columns.start :])
            for each in ids
        )
        with torch.cuda.device(panels.queries.get_device()):  # -1, no device, in Triton's interpreter
            kernel[self.grid](
                panels.queries[self.rows],
                panels.queries.stride(0),
                columns_of[self.columns],
                columns_of.stride(0),
                self.from_rows(panels.row_factor),
                self.from_rows(panels.row_limit),
                panels.row_factor.shape[1],
                self.from_columns(column_factor),
                self.from_columns(column_limit),
                column_factor.shape[1],
                *(each for pair in pairs_of_ids for each in pair),
                self.height,
                self.width,
                self.rows.start - first - self.columns.start,
                *arguments,
                ENDS=panels.ends,
                OF_TARGETS=self.of_targets,
                PRECISION=panels.precision,
                BLOCK_M=panels.shape.tile,
                BLOCK_N=panels.shape.tile,
                BLOCK_K=panels.shape.chunk,
                num_warps=panels.shape.warps,
                num_stages=panels.shape.stages,
                enable_fp_fusion=True,
                **constants,
            )

    def from_rows(self, vector: Tensor | None) -> Tensor | None:
        """A `Panels.vector` over all rows, from the first row of this panel on."""
        return None if vector is None else vector[:, self.rows.start :]

    def from_columns(self, vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector[:, self.columns.start :]
