"""How large the parameters of each tower are, and how large a step's update is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

SAMPLE = 65_536
"""Values read of each parameter: enough for norms to about one percent, and small beside any model."""


class UpdateNorms:
    """L2 norms of a tower's parameters and of one step's update, estimated from evenly spaced values of each parameter.

    Args:
        towers: {tower: its trainable parameters}, whole ones: none under ZeRO 3, which partitions them.
    """

    def __init__(self, towers: Mapping[str, Sequence[nn.Parameter]]):
        self.towers = towers
        self._before: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def before(self) -> None:
        """Call before the step that is measured."""
        self._before = {tower: [_values(p).clone() for p in ps] for tower, ps in self.towers.items()}

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        """{"parameter_norm/TOWER", "update_norm/TOWER"}; call after the step."""
        norms: dict[str, float] = {}
        for tower, parameters in self.towers.items():
            pairs = [(_values(p), before) for p, before in zip(parameters, self._before[tower], strict=True)]
            weights = [p.numel() / len(before) for p, (_, before) in zip(parameters, pairs, strict=True)]
            squares = [(now.square().sum(), (now - before).square().sum()) for now, before in pairs]
            for name, found in zip(("parameter_norm", "update_norm"), zip(*squares, strict=True), strict=True):
                # Read at once: each number read by itself would make the host wait for the device.
                sums = torch.stack(found).tolist()
                norms[f"{name}/{tower}"] = math.sqrt(sum(w * s for w, s in zip(weights, sums, strict=True)))
        return norms


def _values(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().flatten()[:: parameter.numel() // SAMPLE | 1]  # an even step would miss some columns
