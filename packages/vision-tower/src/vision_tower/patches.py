"""The grid of patches: cutting them out, dropping some (patch dropout), resampling the position table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 1 << 64


def patchify(images: Tensor, patch: int) -> Tensor:
    """`[N, 3, H, W]` cut into squares, row by row: `[N, rows * columns, 3 * patch * patch]`, each in the order of a
    convolution's weights; trailing pixels that fill no patch are dropped."""
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    images = images[:, :, : rows * patch, : columns * patch]
    cut = torch.unflatten(torch.unflatten(images, 3, (columns, patch)), 2, (rows, patch))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _int64(value: int) -> int:
    """The 64-bit two's complement of any integer."""
    value %= _WORD
    return value - _WORD if value >= _WORD >> 1 else value


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014) on int64: a bijection whose output bits look independent."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _int64(factor)  # the mask makes the shift a logical one
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def patch_keep_indices(seeds: Tensor | Sequence[int], num_patches: int, drop_rate: float) -> Tensor:
    """Patches of each image that stay under patch dropout (FLIP, arXiv 2212.00794), a pure function of its seed.

    The order of the batch, the rank, the device and the state of generators have no influence, so gradient caching and
    a resumed run repeat it exactly.

    Args:
        seeds: int64 `[N]`, or integers: one for each sample, such as a hash of its key, the run's seed and the step.
        num_patches: patches of an image, `VisionTowerConfig.num_patches`.
        drop_rate: share to drop, 0 <= drop_rate < 1.

    Returns:
        int64 `[N, K]`, ascending in each row, on the seeds' device, with K = max(1, round((1 - drop_rate) *
        num_patches)).

    Raises:
        ValueError: a number out of range, or seeds of another kind.
    """
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate is {drop_rate}; expected 0 <= drop_rate < 1")
    if num_patches < 1:
        raise ValueError(f"num_patches is {num_patches}; expected at least 1")
    if not isinstance(seeds, Tensor):
        seeds = torch.tensor([_int64(int(seed)) for seed in seeds], dtype=torch.int64, device="cpu")
    if seeds.ndim != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds are {seeds.dtype} {list(seeds.shape)}; expected int64 [N], one for each sample")
    keep = max(1, round((1 - drop_rate) * num_patches))
    patches = torch.arange(num_patches, device=seeds.device)
    # One stream per sample, one draw per patch; the patch's number in the low bits makes all draws distinct.
    draws = _mix(_mix(seeds)[:, None] + (patches + 1) * _int64(0x9E3779B97F4A7C15))
    bits = num_patches.bit_length()
    draws = ((draws >> bits) << bits) | patches
    return draws.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


def resample_position_table(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], *, mode: str = "bicubic"
) -> Tensor:
    """Resamples a table of absolute positions `[1, 1 + h * w, C]` from one grid of patches to another, as EVA does.

    The class token's row stays; the others are interpolated in float32 or above with `antialias=False,
    align_corners=False` and returned in the table's dtype. (timm's loader antialiases, and differs by some 8 %.)
    For an optimizer's moments see `resample_optimizer_state`.

    Raises:
        ValueError: another mode, or a table that does not fit `old_grid`.
    """
    if mode not in ("bicubic", "bilinear"):
        raise ValueError(f"mode is {mode!r}; expected 'bicubic', or 'bilinear' for what must not become negative")
    rows, columns = old_grid
    if table.ndim != 3 or table.shape[:2] != (1, 1 + rows * columns):
        raise ValueError(
            f"position table is {list(table.shape)}; expected [1, {1 + rows * columns}, C] for a {rows}x{columns} grid"
        )
    if tuple(old_grid) == tuple(new_grid):
        return table
    if table.is_meta:  # interpolating there imports PyTorch's compiler
        return table.new_empty(1, 1 + new_grid[0] * new_grid[1], table.shape[2])
    class_row, patch_rows = table[:, :1], table[:, 1:]
    wide = patch_rows.to(torch.promote_types(table.dtype, torch.float32))
    image = torch.unflatten(wide, 1, (rows, columns)).permute(0, 3, 1, 2)
    image = _Interpolate.apply(image, tuple(new_grid), mode)
    return torch.cat([class_row, image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


class _Interpolate(torch.autograd.Function):
    """`[N, C, H, W]` to another height and width. PyTorch's own gradient on a GPU is summed by atomics, and differs
    from run to run; here it is two products."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
        ctx.old, ctx.size, ctx.mode = tuple(image.shape[2:]), size, mode
        return _interpolated(image, size, mode)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # What becomes of each row, and of each column, alone.
        rows, columns = (
            _interpolated(torch.eye(old, dtype=grad.dtype, device=grad.device)[None, :, :, None], (new, 1), ctx.mode)
            for old, new in zip(ctx.old, ctx.size, strict=True)
        )
        return rows[0, :, :, 0] @ grad @ columns[0, :, :, 0].T, None, None


def _interpolated(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(image, size=size, mode=mode, align_corners=False, antialias=False)


def resample_optimizer_state(
    state: Mapping[str, Tensor], old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> dict[str, Tensor]:
    """An optimizer's state of the position table, resampled to another grid together with the table.

    What has the table's shape is resampled bicubically like the table, unless none of its values is negative: such is a
    second moment, or another quantity that an optimizer takes a root of or divides by (Adagrad's sum, Adamax's norm).
    Bicubic weights are partly negative, and a negative second moment becomes NaN at the next step, so that is resampled
    bilinearly. What has another shape, such as `step`, stays.

    Args:
        state: name to tensor, as in `optimizer.state[tower.pos_embed]` or a checkpoint: `exp_avg`, `exp_avg_sq`,
            `max_exp_avg_sq`, `momentum_buffer`, a float32 copy of the table, `step`, …
        old_grid, new_grid: (rows, columns).

    Raises:
        ValueError: a state in 8 bits, whose numbers are indexes into a table of values.
    """
    rows = 1 + old_grid[0] * old_grid[1]
    moved = dict(state)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (1, rows):
            if not value.is_floating_point():
                raise ValueError(f"{name} is {value.dtype}, which cannot be resampled; start it from zero")
            # Centred RMSprop subtracts grad_avg's square from the second moment: both are resampled alike.
            mode = "bicubic" if bool((value < 0).any()) and name != "grad_avg" else "bilinear"
            moved[name] = resample_position_table(value, old_grid, new_grid, mode=mode)
    return moved
