"""Masked-language-model training, which XLM-RoBERTa's weights need to work with rotary positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from text_tower.config import TextTowerConfig
from text_tower.files import check_keys
from text_tower.lora import INIT_STD
from text_tower.masking import MaskedTokens
from text_tower.norm import LayerNorm
from text_tower.pretrained import load_with_head, save_with_head
from text_tower.tower import TextTower

MAX_LOGITS = 2**27  # at once: half a gigabyte of float32


class MaskedLoss(NamedTuple):
    """A batch's loss: 0-d float32 sum of cross entropies in nats, and over how many tokens.

    Ranks mask different numbers of tokens: the global mean is the sum of totals over the sum of tokens.
    """

    total: Tensor
    tokens: int

    @property
    def mean(self) -> Tensor:
        """The mean over tokens; 0 if nothing was masked."""
        return self.total / max(1, self.tokens)


class LMHead(nn.Module):
    """XLM-RoBERTa's: Linear, GELU, LayerNorm, then the word table as a projection, with a bias of its own."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.layer_norm = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        if not self.dense.weight.is_meta:
            nn.init.normal_(self.dense.weight, std=INIT_STD)
            nn.init.zeros_(self.dense.bias)

    def forward(self, h: Tensor, labels: Tensor, table: Tensor) -> Tensor:
        """Sum of cross entropies, 0-d float32, of predicting `labels` `[M]` from states `h` `[M, width]`.

        If the `[M, vocab]` logits are many, they never exist all at once: the backward pass recomputes each part.
        """
        h = self.layer_norm(F.gelu(self.dense(h)))
        rows = max(1, MAX_LOGITS // len(self.bias))
        if len(h) <= rows:
            return _cross_entropy(h, table, self.bias, labels)
        parts = [
            checkpoint(_cross_entropy, some, table, self.bias, wanted, use_reentrant=False, preserve_rng_state=False)
            for some, wanted in zip(torch.split(h, rows), torch.split(labels, rows), strict=True)
        ]
        return torch.stack(parts).sum()


class MaskedLM(nn.Module):
    """A tower with a head that predicts masked tokens; the head's projection is the tower's word table.

    Args:
        tower: a tower without adapters or projector. Add adapters afterwards, when reading the trained weights:
            `TextTower.from_pretrained(path, adapters=…)`.

    Raises:
        ValueError: a tower with adapters or a projector, or JinaBERT.
    """

    def __init__(self, tower: TextTower):
        super().__init__()
        if tower.config.positions != "rotary":
            raise ValueError(
                f"the tower has positions {tower.config.positions!r}; masked-language-model training is for rotary "
                "XLM-RoBERTa: JinaBERT's words and head are others"
            )
        if tower.config.adapters:
            raise ValueError(
                f"the tower has the adapters {list(tower.config.adapters)}; expected none: masked-language-model "
                "training is for the weights themselves"
            )
        if tower.config.projector:
            raise ValueError(
                "the tower has a projector, which masked-language-model training has no use for: add one afterwards"
            )
        self.tower = tower
        self.lm_head = LMHead(tower.config)

    def forward(self, masked: MaskedTokens, *, sample_seeds: Tensor | None = None) -> MaskedLoss:
        """The loss of predicting what was masked.

        Args:
            masked: from `WholeWordMasking`, on the tower's device.
            sample_seeds: int64 `[N]`, for dropout, as in `TextTower.forward`.
        """
        states = self.tower.token_states(masked.packed, sample_seeds=sample_seeds)
        table = self.tower.embeddings.word_embeddings.weight
        return MaskedLoss(self.lm_head(states[masked.places], masked.labels, table), len(masked.labels))

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter, as `TextTower.layer_ids`; the head is as deep as the top block."""
        depths = {f"tower.{name}": depth for name, depth in self.tower.layer_ids().items()}
        return depths | {f"lm_head.{name}": self.num_layers for name, _ in self.lm_head.named_parameters()}

    @property
    def num_layers(self) -> int:
        """Depth of the top block as `layer_ids` counts it."""
        return self.tower.num_layers

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides: Any) -> MaskedLM:
        """Reads tower and head from any directory that `TextTower.from_pretrained` reads; without one the head is new.

        It does not warn about XLM-RoBERTa's positions: this is the training that such weights need.

        Raises:
            FileNotFoundError, ValueError: as `TextTower.from_pretrained`; also a head that does not fit.
        """
        tower, layout, head = load_with_head(TextTower, Path(path), None, overrides)
        with torch.device("cpu"):
            model = cls(tower)
        model.lm_head.to(torch.float32)
        if head:
            expected = {f"lm_head.{name}": list(tensor.shape) for name, tensor in model.lm_head.state_dict().items()}
            tied = {name: head.pop(name) for name in ("lm_head.decoder.weight", "lm_head.decoder.bias") if name in head}
            table = tower.embeddings.word_embeddings.weight
            if (own := tied.get("lm_head.decoder.weight")) is not None and not torch.equal(own.float(), table):
                raise ValueError(
                    f"{path} has a head whose projection, lm_head.decoder.weight, is not the word table; this model "
                    "knows a tied one only"
                )
            head.setdefault("lm_head.bias", tied.get("lm_head.decoder.bias", torch.zeros(0, device="cpu")))
            check_keys(expected, head, f"{path} (it looks like {layout}, with a head)")
            model.lm_head.load_state_dict({name.removeprefix("lm_head."): t.float() for name, t in head.items()})
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Writes tower and head as transformers' `AutoModelForMaskedLM` reads them; `AutoModel`, `TextTower` and
        `MaskedLM` read the directory too.

        Raises:
            FileExistsError: `path` exists and is not empty.
        """
        head = {f"lm_head.{n}": t for n, t in self.lm_head.state_dict().items()}
        save_with_head(self.tower, path, "transformers", head)


def _cross_entropy(h: Tensor, table: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, table, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="sum")
