"""What depends on the grid of patches: which are kept under patch dropout, and how the position table is resampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 1 << 64


def patchify(images: Tensor, patch: int) -> Tensor:
    """`[N, 3, H, W]` cut into squares, row by row: `[N, rows * columns, 3 * patch * patch]`, each in the order of a
    convolution's weights. Trailing pixels that fill no patch are dropped."""
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    images = images[:, :, : rows * patch, : columns * patch]
    cut = images.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
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
    """Which patches of each image survive patch dropout (FLIP, arXiv 2212.00794), as a pure function of its seed.

    seeds        `[N]` int64, or integers: one for each sample, such as a hash of its key, the run's seed and the step
    num_patches  patches of an image, `VisionTowerConfig.num_patches`
    drop_rate    share to drop, 0 <= drop_rate < 1

    Returns `[N, K]` int64, ascending in each row, on the seeds' device, with K = max(1, round((1 - drop_rate) *
    num_patches)). Neither the order of the batch, nor rank, device or any generator's state plays a part, so gradient
    caching and a resumed run replay it exactly.
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
    # A stream for each sample, one draw for each patch; the low bits are the patch's own, so no two draws are equal.
    draws = _mix(_mix(seeds)[:, None] + (patches + 1) * _int64(0x9E3779B97F4A7C15))
    bits = num_patches.bit_length()
    draws = ((draws >> bits) << bits) | patches
    return draws.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


def resample_position_table(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], *, mode: str = "bicubic"
) -> Tensor:
    """Resamples a table of absolute positions `[1, 1 + h * w, C]` from one grid of patches to another, as EVA does.

    The class token's row is kept as it is; the others are interpolated in float32 or above with `antialias=False,
    align_corners=False` and returned in the table's dtype. (timm's loader antialiases, and differs by some 8 %.)

    For an optimizer's moments see `resample_optimizer_state`.
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
    class_row, patch_rows = table[:, :1], table[:, 1:]
    wide = patch_rows.to(torch.promote_types(table.dtype, torch.float32))
    image = wide.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(new_grid), mode=mode, align_corners=False, antialias=False)
    return torch.cat([class_row, image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def resample_optimizer_state(
    state: Mapping[str, Tensor], old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> dict[str, Tensor]:
    """An optimizer's state of the position table, carried to another grid together with the table.

    state  name to tensor, as `optimizer.state[tower.pos_embed]` or a checkpoint has it: `exp_avg`, `exp_avg_sq`,
           `max_exp_avg_sq`, `momentum_buffer`, a float32 copy of the table, `step`, …

    What has the table's shape is resampled like the table itself, bicubically, unless no value in it is negative. That
    is a second moment, or whatever else an optimizer takes a root of or divides by (Adagrad's sum, Adamax's norm):
    bicubic weights are partly negative, and a negative one becomes NaN at the next step, so it is resampled bilinearly.
    What has another shape, such as `step`, is kept as it is. Raises ValueError for a state in 8 bits, whose numbers are
    places in a table of values.
    """
    rows = 1 + old_grid[0] * old_grid[1]
    moved = dict(state)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (1, rows):
            if not value.is_floating_point():
                raise ValueError(f"{name} is {value.dtype}, which cannot be resampled; start it from zero")
            # Centred RMSprop's grad_avg goes with the squares that it is taken from.
            mode = "bicubic" if bool((value < 0).any()) and name != "grad_avg" else "bilinear"
            moved[name] = resample_position_table(value, old_grid, new_grid, mode=mode)
    return moved
