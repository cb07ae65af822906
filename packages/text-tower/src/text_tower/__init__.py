"""A packed rotary XLM-RoBERTa encoder for text embeddings.

What needs torch is imported at first use: checking a recipe does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from text_tower.config import TextTowerConfig
from text_tower.tokenizer import Tokenizer

if TYPE_CHECKING:
    from text_tower.masked_lm import MaskedLM
    from text_tower.masking import MaskedTokens, WholeWordMasking
    from text_tower.packed import PackedTokens
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

_HOME = {
    "MaskedLM": "masked_lm",
    "MaskedTokens": "masking",
    "PackedTokens": "packed",
    "TextTower": "tower",
    "WholeWordMasking": "masking",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
