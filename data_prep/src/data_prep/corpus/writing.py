"""Trains the corpus's tokenizer on its training texts alone, and writes items as samples of each kind."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

from data_prep.corpus.items import ImageItem, TextItem, normalized
from data_prep.corpus.split import SPLITS
from data_prep.curation.tokens import TokenCounter
from data_prep.errors import UserError
from data_prep.samples import Text, captions_json, languages_of, texts_json
from data_prep.shards import DatasetWriter

NEGATIVES = 7  # as many as the paper's triplets have
_SAMPLES_PER_SHARD = 500
_TOKENIZER_ITEMS = 2500
_TOKENIZER_CHARACTERS = 200
_Item = TypeVar("_Item", ImageItem, TextItem)
Sample = tuple[str, dict[str, bytes], list[Text]]  # key, members, texts


def training_texts(images: Sequence[ImageItem], texts: Sequence[TextItem], where: Mapping[str, str]) -> list[str]:
    """The training texts of the tokenizer, each once.

    Names, keywords and flags of the training images, and the shorter texts of some of the other training items: all of
    them would outweigh the images' many scripts and take a minute longer.
    """
    found: dict[str, None] = {}
    for image in images:
        if where[image.name] == "train":
            own_long = image.long if image.long_source != "emoji" else ()  # an emoji's repeat its name and keywords
            found.update(dict.fromkeys(text.text for text in (*image.names, *image.keywords, *own_long)))
    for item in [item for item in texts if where[item.name] == "train"][:_TOKENIZER_ITEMS]:
        own = [text.text for text in (*item.query, *item.target)]
        found.update(dict.fromkeys(text for text in own if len(text) <= _TOKENIZER_CHARACTERS))
    return list(found)


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


def write_datasets(
    root: Path,
    images: Sequence[ImageItem],
    texts: Sequence[TextItem],
    *,
    where: Mapping[str, str],
    family_of: Mapping[str, str],
    tokenizer: TokenCounter,
) -> dict[str, dict[str, int]]:
    """Write every data set below `root`; returns split → "kind/source" → samples."""
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        samples: dict[tuple[str, str], list[Sample]] = {}
        own_images = _shuffled([item for item in images if where[item.name] == split])
        own_texts = _shuffled([item for item in texts if where[item.name] == split])
        for source in sorted({item.source for item in own_images}):
            of_source = [item for item in own_images if item.source == source]
            samples["image-short", source] = [_image(item, source, item.names) for item in of_source]
            samples["text-pairs", source] = [_pair(item.name, source, item.names, item.names) for item in of_source]
            samples["text-pairs", f"{source}-keywords"] = [
                _pair(item.name, f"{source}-keywords", item.keywords, item.names) for item in of_source if item.keywords
            ]
            negatives = hard_negatives(of_source, family_of)
            samples["text-triplets", source] = [
                _triplet(item, negatives[item.name]) for item in of_source if item.name in negatives
            ]
        for source in sorted({item.long_source for item in own_images}):
            samples["image-long", source] = [
                _image(item, source, item.long) for item in own_images if item.long_source == source and item.long
            ]
        for source in sorted({item.source for item in own_texts}):
            samples["text-pairs", source] = [
                _pair(item.name, source, item.query, item.target) for item in own_texts if item.source == source
            ]
        counts[split] = {}
        for (kind, source), found in sorted(samples.items()):
            if found:
                _write(root / split / kind / source, kind, source, found, tokenizer)
                counts[split][f"{kind}/{source}"] = len(found)
    return counts


def _write(directory: Path, kind: str, source: str, samples: list[Sample], tokenizer: TokenCounter) -> None:
    tokens = tokenizer.counts([text.text for _, _, texts in samples for text in texts])
    place = 0
    with DatasetWriter(
        directory, kind=kind, source=source, samples_per_shard=_SAMPLES_PER_SHARD, tokenizer_sha256=tokenizer.sha256
    ) as writer:
        for key, members, texts in samples:
            longest = max(tokens[place : place + len(texts)])
            place += len(texts)
            writer.write(key, members, languages=languages_of(texts), tokens=longest)


def _image(item: ImageItem, source: str, captions: Iterable[Text]) -> Sample:
    texts = list(captions)
    return item.name, {"png": item.png, "json": captions_json(texts, source=source, item=item.name)}, texts


def _pair(name: str, source: str, query: Sequence[Text], target: Sequence[Text]) -> Sample:
    return name, {"json": texts_json(query, target, source=source, item=name)}, [*query, *target]


def _triplet(item: ImageItem, others: Sequence[ImageItem]) -> Sample:
    negatives = [other.names for other in others]
    content = texts_json(item.names, item.names, negatives, source=item.source, item=item.name)
    return item.name, {"json": content}, [*item.names, *(text for names in negatives for text in names)]


def _shuffled(items: list[_Item]) -> list[_Item]:
    """Shuffled by a hash, so that a sequential reader does not see one subject after another."""
    return sorted(items, key=lambda item: hashlib.sha256(item.name.encode()).digest())


def hard_negatives(items: Sequence[ImageItem], family_of: Mapping[str, str]) -> dict[str, list[ImageItem]]:
    """Seven neighbours for each item: of the same group first, then by their place in the order of the source.

    `items` are those of one source in one split. Neighbours of the same family, or with a name of the item in some
    language, would be right answers and are skipped; the seven have different English names. Items with fewer than
    seven are left out of the result.
    """
    words = {item.name: {(text.language, normalized(text.text)) for text in item.names} for item in items}
    chosen: dict[str, list[ImageItem]] = {}
    for item in items:
        found: dict[str, ImageItem] = {}  # by the English name
        for other in sorted(items, key=lambda other: _distance(item, other)):
            if family_of[other.name] == family_of[item.name] or words[other.name] & words[item.name]:
                continue
            found.setdefault(normalized(other.english), other)
            if len(found) == NEGATIVES:
                chosen[item.name] = list(found.values())
                break
    return chosen


def _distance(item: ImageItem, other: ImageItem) -> tuple[int, int, str]:
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(item.group, other.group, strict=False))
    return -len(list(shared)), abs(item.order - other.order), other.name
