"""Texts with hidden words, for masked-language-model training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from text_tower import PackedTokens, Tokenizer, WholeWordMasking

from stage_trainer.batch import MaskedBatch
from stage_trainer.data.config import DataConfig
from stage_trainer.data.drawn import Drawn
from stage_trainer.data.texts import Texts
from stage_trainer.errors import UserError
from stage_trainer.recipe import Stage


class MaskedTexts(Texts[MaskedBatch]):
    """Hides whole words.

    Raises:
        UserError: as `Texts`; a tokenizer without `<mask>`.
    """

    def __init__(self, data: DataConfig, stage: Stage, split: str, tokenizer: Tokenizer):
        try:
            self._hide = WholeWordMasking(tokenizer, stage.masking.share)
        except ValueError as error:  # the tokenizer's own words
            raise UserError(str(error)) from error
        super().__init__(data, stage, split, tokenizer)

    def made(self, ids: list[list[int]], seeds: Sequence[int], drawn: Drawn) -> MaskedBatch:
        packed, keys = PackedTokens.from_lists(ids), torch.tensor(seeds, dtype=torch.int64)
        drawn.count_tokens(packed)
        return MaskedBatch(self._hide(packed, keys), keys)
