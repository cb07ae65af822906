"""Splits items into train, validation and test, so that training sees no held-out item in any language or kind."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from data_prep.corpus.items import ImageItem, TextItem, normalized
from data_prep.corpus.render import pixels
from data_prep.groups import first_of_group

SPLITS = ("train", "validation", "test")
LARGEST_HELD_OUT_FAMILY = 12  # items; a larger family would fill a pool with one subject

_LOOK_SIDE = 16  # pixels of the thumbnails that are compared
_LOOK_ALIKE = 2.0  # mean difference of 255 below which two pictures count as one


def drop_identical(items: Sequence[ImageItem]) -> tuple[list[ImageItem], int]:
    """Items with the same image: keep the first. Returns the kept ones and how many were dropped."""
    kept: dict[bytes, ImageItem] = {}
    for item in items:
        kept.setdefault(hashlib.sha256(item.png).digest(), item)
    return list(kept.values()), len(items) - len(kept)


def similar_pairs(items: Sequence[ImageItem]) -> list[tuple[str, str]]:
    """Pairs of names of items whose images hardly differ (flags of one design, a redrawn stamp): one family."""
    if not items:
        return []
    looks = np.stack([pixels(item.png, _LOOK_SIDE).ravel() for item in items])
    pairs = []
    for place, look in enumerate(looks[:-1]):
        differences = np.abs(looks[place + 1 :] - look).mean(axis=1)
        others = np.flatnonzero(differences < _LOOK_ALIKE).tolist()
        pairs += [(items[place].name, items[place + 1 + other].name) for other in others]
    return pairs


def families(items: Iterable[ImageItem | TextItem], pairs: Iterable[tuple[str, str]] = ()) -> dict[str, str]:
    """Item name → family name: items connected by labels or `pairs`, in any number of steps, are one family."""
    items = list(items)
    names = sorted(item.name for item in items)
    number = {name: place for place, name in enumerate(names)}
    with_label: dict[str, int] = {}
    joined = [
        (number[item.name], with_label.setdefault(label, number[item.name])) for item in items for label in item.labels
    ]
    joined += [(number[one], number[other]) for one, other in pairs]
    # A family is named after its first item, not after a label, so that a rule with more labels renames few.
    first = first_of_group(len(names), np.array(joined, np.int64).reshape(-1, 2))
    return {item.name: names[first[number[item.name]]] for item in items}


def split_items(
    items: Sequence[ImageItem | TextItem], family_of: Mapping[str, str], *, held_out: Mapping[str, int], seed: int
) -> dict[str, str]:
    """Item name → "train", "validation" or "test".

    Families are taken in the order of a hash of their name and the seed. Each goes to test while test has fewer than
    `held_out[source]` items of one of its sources, else to validation by the same rule, else to train. Large families,
    and those with two items of a source under one English caption (a query would have two right answers), are for
    training only.
    """
    members: dict[str, list[ImageItem | TextItem]] = {}
    for item in items:
        members.setdefault(family_of[item.name], []).append(item)
    counts = {"test": Counter[str](), "validation": Counter[str]()}
    where: dict[str, str] = {}
    for family in sorted(members, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        group = members[family]
        split = "train"
        if len(group) <= LARGEST_HELD_OUT_FAMILY and not _ambiguous(group):
            sources = Counter(item.source for item in group)
            for candidate in ("test", "validation"):
                if any(counts[candidate][source] < held_out.get(source, 0) for source in sources):
                    split = candidate
                    counts[candidate] += sources
                    break
        where.update({item.name: split for item in group})
    return where


def leaks(items: Sequence[ImageItem], where: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """How many held-out names also occur in training, in the same language, word for word.

    Equal English names are impossible by construction; other languages may have one word for two things.
    """
    names: dict[str, list[tuple[str, str, str]]] = {split: [] for split in SPLITS}  # item, language, name
    for item in items:
        names[where[item.name]] += [(item.name, text.language, normalized(text.text)) for text in item.names]
    trained = {name[1:] for name in names["train"]}
    report = {}
    for split in SPLITS[1:]:
        hits = [name for name in names[split] if name[1:] in trained]
        report[split] = {
            "items": len({item for item, *_ in hits}),
            "of_items": len({item for item, *_ in names[split]}),
            "texts": len(hits),
            "of_texts": len(names[split]),
            "english_texts": sum(language == "en" for _, language, _ in hits),
        }
    return report


def _ambiguous(group: Sequence[ImageItem | TextItem]) -> bool:
    captions = [
        (item.source, normalized(item.english)) for item in group if isinstance(item, ImageItem) and item.english
    ]
    return len(set(captions)) < len(captions)
