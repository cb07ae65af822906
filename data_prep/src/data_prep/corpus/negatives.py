"""Hard negatives: the nearest other items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from data_prep.corpus.items import ImageItem, normalized

NEGATIVES = 7  # as many as the paper's triplets have


def hard_negatives(items: Sequence[ImageItem], family_of: Mapping[str, str]) -> dict[str, list[ImageItem]]:
    """Seven neighbours for each item: of the same group first, then by their place in the order of the source.

    `items` are those of one source in one split. Neighbours of the same family, or with a name of the item in some
    language, would be right answers and are skipped; the seven have different English names. Items with fewer than
    seven are left out of the result.
    """
    words = {item.name: {(text.language, normalized(text.text)) for text in item.names} for item in items}
    chosen: dict[str, list[ImageItem]] = {}
    for item in items:
        ranked = sorted(items, key=lambda other: _distance(item, other))
        found: list[ImageItem] = []
        captions: set[str] = set()
        for other in ranked:
            if family_of[other.name] == family_of[item.name] or words[other.name] & words[item.name]:
                continue
            caption = normalized(other.english)
            if caption in captions:
                continue
            captions.add(caption)
            found.append(other)
            if len(found) == NEGATIVES:
                chosen[item.name] = found
                break
    return chosen


def _distance(item: ImageItem, other: ImageItem) -> tuple[int, int, str]:
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(item.group, other.group, strict=False))
    return -len(list(shared)), abs(item.order - other.order), other.name
