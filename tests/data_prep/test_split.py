"""What is held out stays out: families, pools, look-alikes, hard negatives, and the count of what leaks."""

from __future__ import annotations

from collections import Counter

import pytest
from data_prep.corpus.items import ImageItem
from data_prep.corpus.render import encode_png
from data_prep.corpus.split import drop_identical, families, leaks, similar_pairs, split_items
from data_prep.corpus.writing import hard_negatives
from data_prep.samples import Text
from PIL import Image, ImageDraw


def item(name: str, *, labels=(), english=None, german=None, source="emoji", group=(), order=0, png=b"") -> ImageItem:
    names = (Text(english or name, "en", "name"), Text(german or f"{name} auf Deutsch", "de", "name"))
    return ImageItem(name, source, source, group, order, labels, names, (), (), png)


def picture(*boxes: tuple[int, ...]) -> bytes:
    image = Image.new("RGB", (64, 64), "white")
    for *box, shade in boxes:
        ImageDraw.Draw(image).rectangle(box, fill=(shade, 0, 0))
    return encode_png(image)


def test_families_chain_through_labels_and_pairs():
    items = [item("a", labels=("x",)), item("b", labels=("x", "y")), item("c", labels=("y",)), item("d"), item("e")]
    family_of = families(items, [("d", "e")])
    assert family_of == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "d"}


def test_pools_reach_their_size_and_families_stay_whole():
    items = [item(f"i{n}", labels=(f"f{n // 3}",), source="emoji" if n % 2 else "stamps") for n in range(300)]
    family_of = families(items)
    where = split_items(items, family_of, held_out={"emoji": 20, "stamps": 11}, seed=0)
    assert len(where) == 300
    for family in set(family_of.values()):
        assert len({where[name] for name in family_of if family_of[name] == family}) == 1
    for split in ("validation", "test"):
        counts = Counter(each.source for each in items if where[each.name] == split)
        assert 20 <= counts["emoji"] <= 24
        assert counts["stamps"] >= 11
    assert where == split_items(list(reversed(items)), family_of, held_out={"emoji": 20, "stamps": 11}, seed=0)
    assert where != split_items(items, family_of, held_out={"emoji": 20, "stamps": 11}, seed=1)


def test_large_and_ambiguous_families_are_for_training_alone():
    large = [item(f"large{n}", labels=("large",)) for n in range(13)]
    ambiguous = [
        item(f"rocket{n}", labels=("rocket",), english=caption) for n, caption in enumerate(["A rocket.", "rocket"])
    ]
    both = [item("cat", labels=("cat",)), item("stampcat", labels=("cat",), english="A cat.", source="stamps")]
    items = [*large, *ambiguous, *both]
    where = split_items(items, families(items), held_out={"emoji": 99, "stamps": 99}, seed=0)
    assert {where[each.name] for each in (*large, *ambiguous)} == {"train"}
    assert {where[each.name] for each in both} == {"test"}  # one in each pool: every question has one right answer


def test_of_twins_the_first_stays():
    items = [item("a", png=b"1"), item("b", png=b"2"), item("c", png=b"1")]
    assert drop_identical(items) == (items[:2], 1)


def test_pictures_that_hardly_differ_are_found():
    items = [
        item("a", png=picture((10, 10, 50, 50, 200))),
        item("b", png=picture((10, 10, 50, 50, 203))),
        item("c", png=picture((10, 10, 50, 50, 200), (20, 20, 40, 40, 60))),
    ]
    assert similar_pairs(items) == [("a", "b")]
    assert similar_pairs([]) == []


def test_negatives_come_from_the_group_by_distance_and_pass_over_family_and_synonyms():
    items = [item(f"n{n}", group=("fruit" if n < 9 else "tool", ""), order=n) for n in range(20)]
    items[5] = item("n5", group=("fruit", ""), order=5, german="n4 auf Deutsch")  # one word for two things
    items[6] = item("n6", group=("fruit", ""), order=6, english="N7.")  # bears the next one's English name
    family_of = {each.name: each.name for each in items} | {"n3": "n4"}
    found = [other.name for other in hard_negatives(items, family_of)["n4"]]
    assert found == ["n2", "n6", "n1", "n0", "n8", "n9", "n10"]


def test_without_seven_others_there_are_no_negatives():
    items = [item(f"n{n}", order=n) for n in range(7)]
    assert hard_negatives(items, {each.name: each.name for each in items}) == {}


def test_leaks_are_counted_by_language():
    items = [item("one", german="Hut"), item("two", german="der Hut"), item("three", german="HUT!"), item("four")]
    where = {"one": "train", "two": "train", "three": "test", "four": "validation"}
    report = leaks(items, where)
    assert report["test"] == {"items": 1, "of_items": 1, "texts": 1, "of_texts": 2, "english_texts": 0}
    assert report["validation"]["texts"] == 0


@pytest.mark.parametrize("seed", range(5))
def test_no_english_caption_is_on_both_sides_when_captions_are_labels(seed):
    captions = [f"thing {n % 40}" for n in range(100)]
    items = [
        item(f"i{n}", labels=(f"caption:{text}",), english=text, source=f"s{n % 3}") for n, text in enumerate(captions)
    ]
    where = split_items(items, families(items), held_out={"s0": 8, "s1": 8}, seed=seed)
    assert all(leak["english_texts"] == 0 for leak in leaks(items, where).values())
    assert set(where.values()) == {"train", "validation", "test"}
