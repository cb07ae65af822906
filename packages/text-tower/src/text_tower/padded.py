"""The tower on a padded batch, with plain tensors in and out: what torch.export and other runtimes take.

`torch.export` turns Python numbers into constants, and a packed batch is planned by its lengths on the host. Here the
blocks get the same rows of tokens, but padding is among them, and a mask keeps it out of attention and of the mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text_tower.blocks import Embeddings, Encoder
from text_tower.config import TextTowerConfig
from text_tower.norm import LayerNorm
from text_tower.positions import Positions, scheme
from text_tower.projector import project


class PaddedTower(nn.Module):
    """A text tower without adapters on padded ids, for inference; made by `TextTower.padded`, whose modules it shares.

    `torch.export.export(tower.padded(), (ids,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))` gives a graph for
    any number of texts and any length.
    """

    def __init__(
        self,
        config: TextTowerConfig,
        embeddings: Embeddings,
        emb_ln: LayerNorm,
        encoder: Encoder,
        projector: nn.Module | None = None,
    ):
        super().__init__()
        self.config = config
        self.embeddings, self.emb_ln, self.encoder, self.projector = embeddings, emb_ln, encoder, projector

    def forward(self, ids: Tensor) -> Tensor:
        """Embeds N texts.

        Args:
            ids: int64 `[N, L]`; where it is `config.pad_id` there is no token. The tower's `max_length` and vocabulary
                are not checked.

        Returns:
            Float32 `[N, output_width]`, as `TextTower.forward` of the same texts without padding; zeros for a text that
            is padding alone.
        """
        real = ids != self.config.pad_id
        count = real.sum(1, keepdim=True)
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        positions = scheme(self.config, places.flatten())
        attention = _Masked(real | (count == 0), positions)  # a softmax over nothing would be no number

        h = self.emb_ln(self.embeddings(ids.flatten(), None))
        h = self.encoder(h, attention, None, None, False)
        h = torch.unflatten(h.to(torch.promote_types(h.dtype, torch.float32)), 0, ids.shape)
        return project(self.projector, h.masked_fill(~real[..., None], 0.0).sum(1) / count.clamp(min=1))


class _Masked:
    """Self-attention within each row of a padded batch.

    Args:
        keys: bool `[N, L]`, what is attended to.
        positions: of the N · L tokens, row after row.
    """

    def __init__(self, keys: Tensor, positions: Positions):
        self.keys, self.positions = keys, positions

    def __call__(self, qkv: Tensor) -> Tensor:
        """`[N · L, 3, heads, d]` -> `[N · L, heads, d]`."""
        qk, v = torch.split(qkv, [2, 1], dim=1)
        parts = (*self.positions(qk).unbind(1), v.squeeze(1))
        q, k, v = (torch.unflatten(part, 0, self.keys.shape).transpose(1, 2) for part in parts)
        mask = self.keys[:, None, None, :]
        if self.positions.slopes is not None:
            places = torch.arange(self.keys.shape[1], device=q.device)
            bias = -self.positions.slopes[:, None, None] * (places[:, None] - places).abs()
            mask = bias.to(q.dtype).masked_fill(~mask, -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1)
