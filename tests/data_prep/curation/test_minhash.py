"""Near-duplicate texts: the estimate against exact Jaccard similarity, and groups against planted copies."""

from __future__ import annotations

import itertools
import random

import datasketch
import numpy as np
import pytest
from data_prep.curation.minhash import Signatures, estimate, match, matches, near_duplicates, normalize_text, signatures

DRAW = random.Random(7)
WORDS = ["".join(DRAW.choices("abcdefghijklmnopqrstuvwxyz", k=DRAW.randint(2, 9))) for _ in range(4000)]


def sentence(words: int = 20) -> list[str]:
    return DRAW.choices(WORDS, k=words)


def changed(words: list[str], count: int) -> list[str]:
    other = words.copy()
    for place in DRAW.sample(range(len(words)), count):
        other[place] = DRAW.choice(WORDS)
    return other


def jaccard(one: str, two: str) -> float:
    sets = [{text[place : place + 5] for place in range(len(text) - 4)} for text in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_the_share_of_equal_minima_estimates_jaccard_similarity():
    errors = []
    for number in range(300):
        words = sentence()
        one, two = " ".join(words), " ".join(changed(words, number % 20))
        low = signatures([one, two]).low
        errors.append(estimate(low[:1], low[1:])[0] - jaccard(one, two))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.05  # sqrt(0.25 / 120) = 0.046 at most


def test_a_signature_does_not_depend_on_the_batch():
    texts = [" ".join(sentence(n)) for n in (1, 30, 3)] + ["", "日本語の文", "a", "\ud800"]
    together, alone = signatures(texts), Signatures.join([signatures([text]) for text in texts])
    assert (together.bands == alone.bands).all()
    assert (together.low == alone.low).all()
    kept = Signatures.from_bytes(b"".join(together.to_bytes()))
    assert (kept.bands == together.bands).all()
    assert (kept.low == together.low).all()


def test_case_marks_and_spaces_make_no_difference():
    found = signatures(["A small, red house!", "a small  red house", "a small red mouse"])
    assert (found.low[0] == found.low[1]).all()
    assert not (found.low[0] == found.low[2]).all()


@pytest.mark.parametrize(("one", "two"), [("कि", "का"), ("বই", "বাই"), ("ปู", "ปี"), ("சில", "சால")])
def test_vowel_signs_make_a_difference(one, two):
    assert normalize_text(one) == one
    found = signatures([one, two])
    assert not (found.low[0] == found.low[1]).all()


def test_what_is_drawn_otherwise_is_alike():
    assert normalize_text("Ein ❤\ufe0f Herz!") == normalize_text("ein ❤ herz")
    assert normalize_text("e\u0301te\u0301_x") == "été x"


def test_planted_copies_are_found_and_nothing_else():
    texts, expected = [], []
    for _ in range(400):
        words = sentence(40)
        expected.append(len(texts))
        texts.append(" ".join(words))
        for _ in range(DRAW.randint(0, 2)):
            expected.append(expected[-1])
            texts.append(" ".join(changed(words, 2)))
    similar = [
        jaccard(normalize_text(texts[n]), normalize_text(texts[first]))
        for n, first in enumerate(expected)
        if n != first
    ]
    assert min(similar) > 0.75
    found = near_duplicates(signatures(texts), similarity=0.7)
    assert (found == np.array(expected)).mean() > 0.995
    assert (found <= np.arange(len(texts))).all()
    assert (near_duplicates(signatures(texts), similarity=1.0) == np.arange(len(texts))).all()


def greedy(texts: list[str], similarity: float) -> list[int]:
    """Brute force: each text falls to the likest of the earlier ones that stay, or stays."""
    runs, found = [normalize_text(text) for text in texts], []
    for number, own in enumerate(runs):
        alike = [(jaccard(own, runs[n]), -n) for n in range(number) if found[n] == n]
        best, other = max(alike, default=(0.0, 0))
        found.append(-other if best >= similarity else number)
    return found


def test_templates_are_told_apart_as_by_brute_force_and_chains_do_not_collapse():
    """Invoices: nearly all pairs are 0.7 alike, so that the estimate alone would join most of them."""
    draw = random.Random(3)
    texts = [
        f"Please tell me what the total amount due on invoice {draw.randint(10_000, 99_999)} was, in euros, net."
        f"\nThe total amount that was due was {draw.randint(100, 99_999)} euros without tax."
        for _ in range(250)
    ]
    words = sentence(40)
    for _ in range(30):  # a chain: each is like the one before, the last is nothing like the first
        words = changed(words, 2)
        texts.append(" ".join(words))
    expected = greedy(texts, 0.8)
    found = near_duplicates(signatures(texts), similarity=0.8, text_of=texts.__getitem__)
    stay = [number == first for number, first in enumerate(expected)]
    assert 200 < sum(stay) < 270
    assert [number == first for number, first in enumerate(found.tolist())] == stay
    apart = [n for n in range(len(texts)) if jaccard(*map(normalize_text, (texts[n], texts[found[n]]))) < 0.8]
    assert not apart, "what goes is as alike as was asked for to what it falls to"


def test_only_those_among_which_is_asked_fall_or_are_fallen_to():
    texts = [" ".join(sentence(30)), " ".join(sentence(30))]
    texts = [texts[0], texts[1], texts[0], texts[0], texts[1]]
    among = np.array([False, True, True, True, True])
    assert near_duplicates(signatures(texts), among=among, text_of=texts.__getitem__).tolist() == [0, 1, 2, 2, 1]
    assert near_duplicates(signatures([]), text_of=texts.__getitem__).tolist() == []


@pytest.mark.parametrize(
    "others",
    [
        ["C++?", "C#?", "C?"],
        ["5 %", "5 $", "5"],
        ["a+b", "a=b", "a b"],
        ["10*5", "10/5", "10-5"],
        ["5²", "52", "5 2"],
        ["-5 °C", "5 °C", "5 °F"],
        ["5 ‰", "5 %", "5"],
    ],
)
def test_signs_that_say_something_are_no_punctuation(others):
    assert len({normalize_text(one) for one in others}) == len(others)
    assert near_duplicates(signatures(others), text_of=others.__getitem__).tolist() == [0, 1, 2]


def test_a_known_text_is_found_in_a_crowded_bucket_and_verified():
    """An evaluation set made of templates: the one that shares the bucket first is often not the one that is alike."""
    parts = itertools.product(["red", "green", "golden", "turquoise"], ["horse", "elephant", "crocodile", "tiger"],
                              ["harbour", "cathedral", "orchard", "station"])  # fmt: skip
    known = [
        f"There is one {colour} {animal} that stands next to the {place} in this picture"
        for colour, animal, place in parts
    ]
    texts = [one.replace("one", "a single") for one in known] + [" ".join(sentence(14)) for _ in range(5)]
    ours, theirs = signatures(texts), signatures(known)
    found = match(ours, theirs, similarity=0.7, text_of=texts.__getitem__, known_text_of=known.__getitem__)
    for number, text in enumerate(texts):
        best = max(jaccard(normalize_text(text), normalize_text(one)) for one in known)
        assert (found[number] >= 0) == (best >= 0.7)
        if found[number] >= 0:
            assert jaccard(normalize_text(text), normalize_text(known[found[number]])) >= 0.7


def test_a_text_is_known_if_it_is_nearly_one_of_those():
    known = [sentence(30) for _ in range(50)]
    texts = [
        " ".join(sentence(30)),
        " ".join(known[17]),
        " ".join(changed(known[30], 1)),
        " ".join(changed(known[4], 25)),
    ]
    found = matches(signatures(texts), signatures([" ".join(words) for words in known]), similarity=0.8)
    assert found.tolist() == [False, True, True, False]
    assert not matches(signatures(texts), signatures([]), similarity=0.8).any()


@pytest.mark.parametrize("known", [1, 2, 3, 60])
def test_what_shares_a_band_with_a_known_text_is_compared_with_it(known):
    """Against all pairs, one by one: whichever of the bands they share, wherever in it."""
    first = [sentence(25) for _ in range(known)]
    texts = [" ".join(changed(words, number % 9)) for number in range(8) for words in first]
    ours, theirs = signatures(texts), signatures([" ".join(words) for words in first])
    for similarity in (0.4, 0.7, 0.9):
        expected = np.zeros(len(texts), bool)
        for number in range(len(texts)):
            for other in np.flatnonzero((ours.bands[number] == theirs.bands).any(1)):
                share = (ours.low[number] == theirs.low[other]).mean()
                expected[number] |= (share - 1 / 256) / (1 - 1 / 256) >= similarity
        assert (matches(ours, theirs, similarity=similarity) == expected).all()
        assert expected.any()


def test_as_datasketch_sees_them():
    words = sentence(30)
    for count, same in ((0, True), (1, True), (12, False), (20, False)):
        pair = [normalize_text(" ".join(words)), normalize_text(" ".join(changed(words, count)))]
        sketches = [datasketch.MinHash(num_perm=256) for _ in pair]
        for sketch, line in zip(sketches, pair, strict=True):
            sketch.update_batch([line[place : place + 5].encode() for place in range(len(line) - 4)])
        theirs = sketches[0].jaccard(sketches[1])
        assert (theirs > 0.75) == same
        assert (near_duplicates(signatures(pair), similarity=0.75)[1] == 0) == same
        low = signatures(pair).low
        assert estimate(low[:1], low[1:])[0] == pytest.approx(theirs, abs=0.15)


def test_signs_without_a_width_are_no_difference():
    text = "The quick brown fox jumps over the lazy dog"
    for sign in "\u00ad\u200b\u200e\u2060\ufeff\u202a":
        assert normalize_text(text.replace("o", f"o{sign}")) == normalize_text(text)
    assert normalize_text("👨\u200d👩") != normalize_text("👨👩")
