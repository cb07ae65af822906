"""XLM-RoBERTa's layers, and JinaBERT's gated MLP: embeddings and post-norm blocks.

Module names are those of the published layout on disk, so that a state dict is a checkpoint without renaming.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from text_tower.config import TextTowerConfig
from text_tower.dropout import KeyedDropout, SiteDropout
from text_tower.lora import AdaptedEmbedding, AdaptedLinear
from text_tower.norm import LayerNorm

Attention = Callable[[Tensor], Tensor]
"""Queries, keys and values `[T, 3, heads, d]` -> `[T, heads, d]`, positions included."""


class Embeddings(nn.Module):
    """Word plus token type; a text is of the first type."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.word_embeddings = _embedding(config, config.vocab_size)
        self.token_type_embeddings = _embedding(config, config.token_types)

    def forward(self, ids: Tensor, adapter: int | None) -> Tensor:
        h: Tensor = self.word_embeddings(ids, adapter) + self.token_type_embeddings(ids.new_zeros(1), adapter)
        return h


class SelfAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.heads = config.heads
        self.Wqkv = _linear(config, config.width, 3 * config.width)
        self.out_proj = _linear(config, config.width, config.width)

    def forward(self, h: Tensor, attention: Attention, adapter: int | None) -> Tensor:
        qkv = torch.unflatten(self.Wqkv(h, adapter), -1, (3, self.heads, -1))
        out: Tensor = self.out_proj(attention(qkv).flatten(1), adapter)
        return out


class MLP(nn.Module):
    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.fc1 = _linear(config, config.width, config.mlp_width)
        self.fc2 = _linear(config, config.mlp_width, config.width)

    def forward(self, h: Tensor, adapter: int | None) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(h, adapter)), adapter)
        return out


class GatedMLP(nn.Module):
    """JinaBERT-v2's GEGLU (arXiv 2002.05202): the first half of `gated_layers` gates the second."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.gated_layers = AdaptedLinear(config.width, 2 * config.mlp_width, *_adapters(config), bias=False)
        self.wo = _linear(config, config.mlp_width, config.width)

    def forward(self, h: Tensor, adapter: int | None) -> Tensor:
        gate, value = self.gated_layers(h, adapter).chunk(2, dim=-1)
        out: Tensor = self.wo(F.gelu(gate) * value, adapter)
        return out


MLPS = {"gelu": MLP, "geglu": GatedMLP}


class Block(nn.Module):
    """Post-norm: h = LN(h + attention(h)); h = LN(h + mlp(h))."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.mixer = SelfAttention(config)
        self.norm1 = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = MLPS[config.mlp](config)
        self.norm2 = LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(
        self, h: Tensor, attention: Attention, adapter: int | None, dropouts: tuple[SiteDropout, SiteDropout] | None
    ) -> Tensor:
        a = self.mixer(h, attention, adapter)
        h = self.norm1(h + (dropouts[0](a) if dropouts else a))
        m = self.mlp(h, adapter)
        out: Tensor = self.norm2(h + (dropouts[1](m) if dropouts else m))
        return out


class Encoder(nn.Module):
    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(
        self, h: Tensor, attention: Attention, adapter: int | None, dropout: KeyedDropout | None, checkpointing: bool
    ) -> Tensor:
        for i, block in enumerate(self.layers):
            dropouts = (dropout.at(2 * i + 1), dropout.at(2 * i + 2)) if dropout else None
            if checkpointing:
                # Dropout is a function of its keys, so there is no generator state to keep.
                h = checkpoint(block, h, attention, adapter, dropouts, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, attention, adapter, dropouts)
        return h


def _linear(config: TextTowerConfig, inputs: int, outputs: int) -> AdaptedLinear:
    return AdaptedLinear(inputs, outputs, *_adapters(config))


def _embedding(config: TextTowerConfig, rows: int) -> AdaptedEmbedding:
    return AdaptedEmbedding(rows, config.width, *_adapters(config))


def _adapters(config: TextTowerConfig) -> tuple[int, int, float]:
    """Number, rank and scale of the adapters."""
    return len(config.adapters), config.lora_rank, config.lora_alpha / max(1, config.lora_rank)
