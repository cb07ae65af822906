"""Whole-word masking of packed texts, a function of each sample's seed alone.

The masked words and their replacements are a hash of (seed, position): the same on any rank, in any batch, and when
repeated; another seed, such as another epoch's, masks other words.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from text_tower.dropout import mix64, token_keys
from text_tower.packed import PackedTokens, on_device
from text_tower.tokenizer import EOS, UNK, Tokenizer

# Blocks of scripts that put no spaces between words: Thai, Lao, Myanmar, Khmer, kana and Han.
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF),
             (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))  # fmt: skip
_SALT = 0x6D61736B6564  # dropout has the same seeds and must be independent of masking


@dataclass(frozen=True, eq=False)
class MaskedTokens:
    """Texts with masked words, and the original tokens.

    Attributes:
        packed: the masked texts.
        places: int64 `[M]`, indexes into `packed.ids` of the tokens to predict, ascending.
        labels: int64 `[M]`, their original ids.
    """

    packed: PackedTokens
    places: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskedTokens:
        """The same on another device."""
        return replace(on_device(self, device, non_blocking), packed=self.packed.to(device, non_blocking))


class WholeWordMasking:
    """Masks whole words, as BERT's later version, with XLM-RoBERTa's shares (arXiv 1810.04805, 1911.02116).

    A word is a piece that begins with `▁` and the pieces up to the next such piece. In scripts without spaces between
    words, where that would be a whole sentence, every piece is a word. Each word is chosen with probability `share`, at
    least one in every text. Of the tokens of chosen words 80 % become `<mask>`, 10 % a random token, and 10 % stay;
    all are predicted. Special tokens and `<unk>` are never chosen.

    Args:
        tokenizer: its pieces give the words.
        share: of words that are masked.

    Raises:
        ValueError: a share that is not between 0 and 1, or a tokenizer without `<mask>`.
    """

    def __init__(self, tokenizer: Tokenizer, share: float = 0.15):
        if not 0 < share < 1:
            raise ValueError(f"share is {share}; expected more than 0 and less than 1")
        self.share, self.mask_id = share, tokenizer.mask_id
        self.begins_word = torch.tensor([_begins_word(p) for p in tokenizer.pieces()], device="cpu")

    def __call__(self, packed: PackedTokens, sample_seeds: Tensor) -> MaskedTokens:
        """Masks words of N texts, on the CPU.

        Args:
            packed: the texts, special tokens included.
            sample_seeds: int64 `[N]`.
        """
        if sample_seeds.shape != (len(packed),) or sample_seeds.dtype != torch.int64:
            raise ValueError(
                f"sample_seeds is {sample_seeds.dtype} {list(sample_seeds.shape)}; expected torch.int64 [{len(packed)}]"
            )
        ids, lengths = packed.ids, torch.tensor(packed.lengths, device="cpu")
        index = torch.arange(len(ids), device="cpu")
        rows = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
        positions = index - (lengths.cumsum(0) - lengths)[rows]
        special = ids <= EOS
        begins = self.begins_word[ids] | special | special.roll(1)  # the first token may lack ▁
        keys = token_keys(sample_seeds[rows] ^ _SALT, positions)

        word_keys = keys[torch.where(begins, index, 0).cummax(0).values]
        eligible = (ids > UNK) & (ids != self.mask_id)  # a text may spell <mask>
        limit = torch.iinfo(torch.int64).max
        smallest = torch.full((len(lengths),), limit, device="cpu").scatter_reduce(
            0, rows, word_keys.masked_fill(~eligible, limit), "amin"
        )
        chosen = eligible & ((_uniform(word_keys) < self.share) | (word_keys == smallest[rows]))

        draws = mix64(keys + 1)
        random_ids = UNK + 1 + (mix64(keys + 2) % (len(self.begins_word) - UNK - 1))
        instead = torch.where(_uniform(draws) < 0.9, random_ids, ids)
        instead[_uniform(draws) < 0.8] = self.mask_id
        places = chosen.nonzero().flatten()
        hidden = replace(packed, ids=torch.where(chosen, instead, ids))
        return MaskedTokens(hidden, places, ids[places])


def _uniform(keys: Tensor) -> Tensor:
    """Int64 hashes as float64 in [0, 1), monotonic."""
    return (keys >> 11).double() / 2**53 + 0.5


def _begins_word(piece: str) -> bool:
    if piece.startswith("▁"):
        return True
    first = ord(piece[0]) if piece else 0
    # A vowel sign or tone mark belongs to the letter before it.
    return any(low <= first <= high for low, high in _UNSPACED) and not unicodedata.category(piece[0]).startswith("M")
