"""The sentencepiece model of the corpus, trained on its training texts alone."""

from __future__ import annotations

import io
from collections.abc import Iterable

from data_prep.errors import UserError


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """The file of a unigram model of `vocab_size` pieces, the same bytes for the same texts in the same order.

    Ids 0, 1 and 2 are `<unk>`, `<s>` and `</s>` and there is no padding piece, as in XLM-R's file, which the text
    tower's tokenizer expects. Nothing is random, and the number of threads is fixed because float sums depend on it.

    Raises:
        UserError: there are too few texts for so many pieces, or the characters alone need more.
    """
    import sentencepiece

    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=buffer,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            shuffle_input_sentence=False,
            input_sentence_size=0,
            max_sentence_length=8192,
            seed_sentencepiece_size=100_000,  # a tenth of the default: twice as fast, and no worse at this size
            num_sub_iterations=1,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"no tokenizer of {vocab_size} pieces from these texts; change --vocab-size ({error})"
        ) from error
    return buffer.getvalue()
