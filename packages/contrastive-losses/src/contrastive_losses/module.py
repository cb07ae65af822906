"""InfoNCE with a temperature of its own: make one for each task."""

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from contrastive_losses.batch import problem_with_dims, problem_with_temperature
from contrastive_losses.info_nce import LossStats, matryoshka_info_nce
from contrastive_losses.ranks import Group


class InfoNCE(nn.Module):
    """`matryoshka_info_nce` with a learnable temperature.

    The parameter is `log_scale`, shape `[1]`, ln(1 / temperature), CLIP's `logit_scale` (2.6593 for 0.07). It stays in
    float32 when the module is moved to bfloat16 or float16, because bfloat16 near ln(1/0.07) has steps of 0.0156. Give
    it no weight decay, and call `clamp_()` after every step of the optimizer: a clamp inside forward would zero the
    gradient at the limit, and the parameter would stick there.

    Args:
        dims: prefix lengths, as for `matryoshka_info_nce`; None is the full width alone.
        weights: one factor for each of `dims`; None is 1 for each.
        temperature: to start from, at least `min_temperature`.
        learnable: whether `log_scale` requires a gradient; a fixed one is still part of the state dict.
        min_temperature: what `clamp_()` holds the temperature above. 0.01 is CLIP's limit, a scale of 100.

    Raises:
        ValueError: settings that do not fit.
    """

    def __init__(
        self,
        dims: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        temperature: float = 0.07,
        learnable: bool = True,
        min_temperature: float = 0.01,
    ) -> None:
        super().__init__()
        problem = (
            problem_with_dims(dims, weights, width=None)
            or problem_with_temperature(temperature)
            or problem_with_temperature(min_temperature)
        )
        if problem is None and temperature < min_temperature:
            problem = f"temperature {temperature} is below min_temperature {min_temperature}; start at it or above"
        if problem is not None:
            raise ValueError(problem)
        self.dims = None if dims is None else tuple(dims)
        self.weights = None if weights is None else tuple(weights)
        self.min_temperature = min_temperature
        start = torch.tensor([-math.log(temperature)], dtype=torch.float32)
        self.log_scale = nn.Parameter(start, requires_grad=learnable)

    @property
    def temperature(self) -> Tensor:
        """`[1]`, exp(-log_scale), with gradient."""
        return torch.exp(-self.log_scale)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the temperature back to `min_temperature` (to float32 rounding) if it fell below. In place."""
        self.log_scale.clamp_(max=-math.log(self.min_temperature))

    def forward(
        self,
        queries: Tensor,
        targets: Tensor,
        negatives: Tensor | None = None,
        *,
        query_ids: Tensor | None = None,
        target_ids: Tensor | None = None,
        sample_weights: Tensor | None = None,
        group: Group | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, LossStats]:
        """queries, targets `[B, D]`, negatives `[B, K, D]`, unnormalised -> 0-d loss, or `(loss, LossStats)`.
        Every argument is that of `matryoshka_info_nce`."""
        return matryoshka_info_nce(
            queries,
            targets,
            temperature=self.temperature,
            negatives=negatives,
            dims=self.dims,
            weights=self.weights,
            query_ids=query_ids,
            target_ids=target_ids,
            sample_weights=sample_weights,
            group=group,
            return_stats=return_stats,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.cuda()`, `.bfloat16()` … go through: follow to the device, refuse a dtype below float32."""

        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < 4 else moved

        return super()._apply(at_least_float32, recurse)

    def extra_repr(self) -> str:
        fixed = "" if self.log_scale.requires_grad else ", learnable=False"
        return f"dims={self.dims}, weights={self.weights}, min_temperature={self.min_temperature}{fixed}"
