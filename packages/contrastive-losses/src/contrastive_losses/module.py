"""Losses with a temperature of their own: make one for each task."""

import math
from collections.abc import Callable, Sequence
from operator import index
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from contrastive_losses.batch import (
    Exchange,
    problem_with_dims,
    problem_with_exchange,
    problem_with_margin,
    problem_with_scalar,
)
from contrastive_losses.info_nce import matryoshka_info_nce
from contrastive_losses.precision import Precision, problem_with_precision
from contrastive_losses.ranks import Group
from contrastive_losses.sigmoid import matryoshka_sigmoid
from contrastive_losses.stats import LossStats


class _WithTemperature(nn.Module):
    """Settings of a loss and its learnable temperature."""

    def __init__(
        self,
        dims: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        temperature: float = 0.07,
        learnable: bool = True,
        min_temperature: float = 0.01,
        false_negative_margin: float | None = None,
        precision: Precision | None = None,
        exchange: Exchange = "auto",
    ) -> None:
        super().__init__()
        problem = (
            problem_with_dims(dims, weights, width=None)
            or problem_with_scalar("temperature", temperature, above=0.0)
            or problem_with_scalar("min_temperature", min_temperature, above=0.0)
            or problem_with_margin(false_negative_margin)
            or problem_with_precision(precision)
            or problem_with_exchange(exchange)
        )
        if problem is None and temperature < min_temperature:
            problem = f"temperature {temperature} is below min_temperature {min_temperature}; start at it or above"
        if problem is not None:
            raise ValueError(problem)
        self.dims = None if dims is None else tuple(map(index, dims))
        self.weights = None if weights is None else tuple(map(float, weights))
        self.min_temperature = min_temperature
        self.false_negative_margin = false_negative_margin
        self.precision = precision
        self.exchange = exchange
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

    def _settings(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "dims": self.dims,
            "weights": self.weights,
            "false_negative_margin": self.false_negative_margin,
            "precision": self.precision,
            "exchange": self.exchange,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.cuda()`, `.bfloat16()` … go through: follow to the device, refuse a dtype below float32."""

        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < 4 else moved

        applied: Self = cast(Any, super())._apply(at_least_float32, recurse)
        return applied

    def extra_repr(self) -> str:
        margin = "" if self.false_negative_margin is None else f", false_negative_margin={self.false_negative_margin}"
        margin += "" if self.precision is None else f", precision={self.precision}"
        fixed = "" if self.log_scale.requires_grad else ", learnable=False"
        return f"dims={self.dims}, weights={self.weights}, min_temperature={self.min_temperature}{margin}{fixed}"


class InfoNCE(_WithTemperature):
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
        false_negative_margin, precision, exchange: as for `matryoshka_info_nce`.

    Raises:
        ValueError: settings that do not fit.
    """

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
            negatives=negatives,
            query_ids=query_ids,
            target_ids=target_ids,
            sample_weights=sample_weights,
            group=group,
            return_stats=return_stats,
            **self._settings(),
        )


class SigmoidLoss(_WithTemperature):
    """`matryoshka_sigmoid`, SigLIP's loss, with a learnable temperature and bias.

    The parameters are `log_scale` and `bias`, both of shape `[1]` and float32, and start where SigLIP starts them: at a
    temperature of 0.1 and a bias of -10, so that the many negative pairs cost nothing at first (arXiv 2303.15343,
    section 3.2). As for `InfoNCE`: no weight decay, and `clamp_()` after every step. `learnable` holds for both.
    """

    def __init__(
        self,
        dims: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        temperature: float = 0.1,
        bias: float = -10.0,
        learnable: bool = True,
        min_temperature: float = 0.01,
        false_negative_margin: float | None = None,
        precision: Precision | None = None,
        exchange: Exchange = "auto",
    ) -> None:
        super().__init__(
            dims, weights, temperature, learnable, min_temperature, false_negative_margin, precision, exchange
        )
        problem = problem_with_scalar("bias", bias)
        if problem is not None:
            raise ValueError(problem)
        self.bias = nn.Parameter(torch.tensor([bias], dtype=torch.float32), requires_grad=learnable)

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
        Every argument is that of `matryoshka_sigmoid`."""
        return matryoshka_sigmoid(
            queries,
            targets,
            bias=self.bias,
            negatives=negatives,
            query_ids=query_ids,
            target_ids=target_ids,
            sample_weights=sample_weights,
            group=group,
            return_stats=return_stats,
            **self._settings(),
        )
