"""Dropout keyed by sample: a sample has the same mask on any rank, in any batch, and when a pass is repeated.

Each element's mask is a counter-based hash of (sample seed, site, position, channel). There is no random state, so
gradient caching and activation checkpointing repeat a forward pass exactly, and N processes drop what one would.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed number


class KeyedDropout:
    """Drops a share `p` of the elements of `[T, C]` activations.

    Args:
        p: share that is dropped, below 1.
        seeds: int64 `[T]`, the seed of each token's sample.
        positions: int64 `[T]`, each token's position in its sample.
    """

    def __init__(self, p: float, seeds: Tensor, positions: Tensor):
        self.p = p
        self.keys = token_keys(seeds, positions)

    def at(self, site: int) -> SiteDropout:
        """The dropout of one site in the network, by number."""
        return SiteDropout(self.p, (mix64(self.keys + site) >> 32).to(torch.int32))


class SiteDropout:
    """`KeyedDropout` at one site; `tokens` is int32 `[T]`, each token's key there."""

    def __init__(self, p: float, tokens: Tensor):
        self.p, self.tokens = p, tokens

    def __call__(self, x: Tensor) -> Tensor:
        """`x` `[T, C]` with dropped elements 0 and the rest scaled by 1 / (1 - p)."""
        return x.masked_fill(~self.keep(x.shape[-1]), 0.0) * (1 / (1 - self.p))

    def keep(self, channels: int) -> Tensor:
        """Bool `[T, channels]`: what stays."""
        columns = torch.arange(channels, device=self.tokens.device, dtype=torch.int32)
        x = self.tokens[:, None] + columns * -0x61C88647
        # lowbias32, a 32-bit finalizer: int32 halves the work; the mask undoes the sign that >> carries in.
        x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
        x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
        x = x ^ ((x >> 16) & 0xFFFF)
        return x >= round(self.p * 2**32) - 2**31


def token_keys(seeds: Tensor, places: Tensor) -> Tensor:
    """An int64 hash of (seed, place), elementwise."""
    return mix64(mix64(seeds) + places * _GOLDEN)


def mix64(x: Tensor) -> Tensor:
    """splitmix64's finalizer on int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
