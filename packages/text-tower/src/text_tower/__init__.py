"""A packed rotary XLM-RoBERTa encoder for text embeddings."""

from text_tower.config import TextTowerConfig
from text_tower.masked_lm import MaskedLM
from text_tower.masking import MaskedTokens, WholeWordMasking
from text_tower.packed import PackedTokens
from text_tower.tokenizer import Tokenizer
from text_tower.tower import TextTower

__all__ = [
    "MaskedLM",
    "MaskedTokens",
    "PackedTokens",
    "TextTower",
    "TextTowerConfig",
    "Tokenizer",
    "WholeWordMasking",
]
