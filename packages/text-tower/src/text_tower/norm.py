"""LayerNorm with an exact gradient of its bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, except that on a CPU in float32 the bias is added apart.

    The bias's gradient is a sum over all tokens. `layer_norm`'s CPU kernel adds them one by one; below a mean over
    tokens they are alike, every rounding goes the same way, and 2,000 tokens are off by 2e-5 already (relative, L2).
    The gradient of a plain addition is PyTorch's own sum, which adds in a cascade and stays below 1e-6. In place, as
    nothing keeps what `layer_norm` returns.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        return F.layer_norm(x, self.normalized_shape, self.weight, None, self.eps).add_(self.bias)
