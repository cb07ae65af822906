"""Hard negatives: the guards against a plain restatement of them, the search against a product, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_prep.cli import main
from data_prep.errors import UserError
from data_prep.negatives.guards import Guards, Known, choose
from data_prep.negatives.search import build_index, search
from data_prep.shards import Dataset, DatasetWriter


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def in_parts(vectors: np.ndarray, size: int = 37):
    return lambda: (vectors[start : start + size] for start in range(0, len(vectors), size))


def test_a_small_set_is_searched_exactly():
    draw = np.random.default_rng(0)
    vectors, queries = unit(draw.normal(size=(200, 16))), unit(draw.normal(size=(20, 16)))
    scores, found = search(build_index(in_parts(vectors), 200), queries, 10)
    product = queries @ vectors.T
    assert (found == np.argsort(-product, axis=1)[:, :10]).all()
    np.testing.assert_allclose(scores, -np.sort(-product, axis=1)[:, :10], atol=1e-5)


def test_inverted_lists_find_nearly_all_and_the_same_each_time():
    draw = np.random.default_rng(0)
    vectors = unit(np.repeat(draw.normal(size=(40, 16)), 50, axis=0) + 0.3 * draw.normal(size=(2000, 16)))
    queries = vectors[::50]
    runs = [search(build_index(in_parts(vectors), 2000, exact_up_to=100), queries, 10)[1] for _ in range(2)]
    assert (runs[0] == runs[1]).all()
    exact = search(build_index(in_parts(vectors), 2000), queries, 10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(runs[0], exact, strict=True)])
    assert recall > 0.95


@pytest.mark.parametrize("guards", [Guards(3, (1, 50), 0.0), Guards(3, (4, 20), 0.1), Guards(7, (2, 40), 0.02)])
def test_what_is_chosen_is_the_hardest_that_breaks_no_rule(guards):
    """Written again, rule by rule and without speed."""
    draw = np.random.default_rng(1)
    count = 120
    asked, texts = draw.integers(0, 60, count), [tuple(draw.integers(0, 90, draw.integers(1, 3))) for _ in range(count)]
    items = draw.integers(0, 100, count)

    def alike(_, one, others):  # 10 and 11, 20 and 21, … are nearly the same text
        return any(one != other and one // 10 == other // 10 and {one % 10, other % 10} == {0, 1} for other in others)

    def right_of(pair):
        return {text for one in np.flatnonzero(asked == asked[pair]) for text in texts[one]}

    known = Known(texts, items, right_of, alike)
    queries, answers = unit(draw.normal(size=(count, 6))), unit(draw.normal(size=(count, 6)))
    answers = unit(answers + queries)
    scores, neighbours = search(build_index(in_parts(answers), count), queries, count)
    kept = 0
    for query in range(count):
        positive = float(queries[query] @ answers[query])
        found, spare, more = choose(query, neighbours[query].tolist(), scores[query].tolist(), positive, known, guards)
        right = {text for n in range(count) if asked[n] == asked[query] for text in texts[n]}
        wrong, seen = [], set()
        for pair in np.argsort(-(queries[query] @ answers.T), kind="stable").tolist():
            if items[pair] == items[query] or seen & set(texts[pair]) or set(texts[pair]) <= right:
                continue
            seen |= set(texts[pair]) - right
            if not right & set(texts[pair]):
                wrong.append(pair)
        window = wrong[guards.ranks[0] - 1 : guards.ranks[1]]
        allowed = [
            pair
            for pair in window
            if queries[query] @ answers[pair] <= positive - guards.margin
            and not any(alike(query, text, right) for text in texts[pair])
        ]
        assert [pair for pair, _ in found] == allowed[: guards.count]
        assert all(places == list(range(len(texts[pair]))) for pair, places in found)
        for pair, places in spare:
            assert 0 < len(places) < len(texts[pair])
            assert not right & {texts[pair][place] for place in places}
        assert more == (len(found) < guards.count and len(wrong) < guards.ranks[1])
        kept += len(found) == guards.count
    assert kept > 0


def test_guards_that_leave_no_room_are_refused():
    for ranks, count in (((1, 6), 7), ((0, 50), 7), ((9, 3), 1), ((1, 9), 0)):
        with pytest.raises(UserError, match="room for all"):
            Guards(count, ranks)


WORDS = [
    "red",
    "blue",
    "green",
    "yellow",
    "grey",
    "black",
    "white",
    "small",
    "large",
    "circle",
    "square",
    "star",
    "ring",
    "line",
    "cross",
    "triangle",
    "two",
    "three",
]


@pytest.fixture(scope="module")
def text_tower(drawn, tmp_path_factory):
    """A text tower of random weights in a folder, and itself."""
    import torch
    from text_tower import TextTower, TextTowerConfig
    from text_tower.tokenizer import Tokenizer

    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(drawn / "tokenizer.model")
    tower = TextTower(TextTowerConfig(vocab_size=386, width=32, layers=1, heads=2, mlp_width=64))
    tower.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("model") / "tower"
    tower.save_pretrained(folder)
    return folder, tower


@pytest.fixture
def pairs(tmp_path):
    """A data set of 60 pairs: two queries have the same answer, two answers the same query, two pairs one item."""
    draw = np.random.default_rng(3)
    queries = [" ".join(draw.choice(WORDS, 6)) for _ in range(60)]
    answers = [f"{query} {' '.join(draw.choice(WORDS, 3))}" for query in queries]
    answers[1] = answers[0]
    queries[3] = queries[2]
    items = [f"item-{n}" for n in range(60)]
    items[5] = items[4]
    with DatasetWriter(tmp_path / "pairs", kind="text-pairs", source="made", samples_per_shard=25) as writer:
        for number, (query, answer, item) in enumerate(zip(queries, answers, items, strict=True)):
            sides = [[{"text": text, "language": "en", "origin": "human", "role": "body"}] for text in (query, answer)]
            fields = {"query": sides[0], "target": sides[1], "source": "made", "item": item}
            writer.write(f"k{number}", {"json": json.dumps(fields).encode()}, languages=["en"], tokens=None)
    return tmp_path / "pairs", queries, answers


def test_pairs_become_triplets_whose_negatives_are_near_and_not_right(text_tower, pairs, tmp_path):
    folder, tower = text_tower
    shards, queries, answers = pairs
    command = ["negatives", str(shards), "--model", str(folder), "--out", str(tmp_path / "out"), "--name", "hard",
               "--ranks", "2", "40", "--margin", "0.001", "--workers", "1"]  # fmt: skip
    assert main(command) == 0
    dataset = Dataset.open(tmp_path / "out/text-triplets/hard", verify=True)
    receipt = json.loads((dataset.directory / "receipt.json").read_text())
    assert receipt["came_in"] == 60
    dropped = receipt["dropped"].get("fewer than 7 negatives passed the guards", 0)
    assert len(dataset) == 60 - dropped > 10
    similar = tower.encode(queries) @ tower.encode(answers).T
    hard = []
    for number in range(len(dataset)):
        sample, own = json.loads(dataset.read(number)["json"]), int(dataset.row(number).key[1:])
        assert sample["query"][0]["text"] == queries[own]
        assert sample["target"][0]["text"] == answers[own]
        found = [texts[0]["text"] for texts in sample["negatives"]]
        assert len(set(found)) == len(found) == 7
        right = {answers[n] for n in range(60) if queries[n] == queries[own]} | {answers[own]}
        assert not right & set(found)
        scores = [similar[own, answers.index(text)] for text in found]
        assert max(scores) <= similar[own, own] - 0.0005
        hard.append(np.mean(scores) - similar[own].mean())
        if own in (4, 5):
            assert answers[9 - own] not in found
    assert np.mean(hard) > 0
    assert main(command) == 0  # once more: nothing to do


def test_a_folder_without_a_model_and_data_without_pairs_are_refused(pairs, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--name", "hard"]
    assert main(["negatives", str(pairs[0]), "--model", str(tmp_path), *out]) == 2
    assert "holds no text tower" in capsys.readouterr().err


@pytest.mark.parametrize("empty", ["query", "target"])
def test_a_pair_without_one_of_its_sides_is_named(text_tower, tmp_path, capsys, empty):
    side = [{"text": "red circle", "language": "en", "origin": "human", "role": "body"}]
    with DatasetWriter(tmp_path / "pairs", kind="text-pairs", source="made") as writer:
        for number in range(3):
            fields = {"query": side, "target": side, "source": "made", "item": str(number)}
            fields |= {empty: []} if number == 1 else {}
            writer.write(f"k{number}", {"json": json.dumps(fields).encode()}, languages=["en"], tokens=None)
    out = ["--out", str(tmp_path / "out"), "--name", "hard", "--workers", "1"]
    assert main(["negatives", str(tmp_path / "pairs"), "--model", str(text_tower[0]), *out]) == 2
    assert f"sample 'k1': its .json has no {empty}, which" in capsys.readouterr().err


def write(folder, rows):
    with DatasetWriter(folder, kind="text-pairs", source="made", samples_per_shard=100) as writer:
        for number, (query, answers) in enumerate(rows):
            sides = [
                [{"text": text, "language": "en", "origin": "human", "role": "body"} for text in texts]
                for texts in ([query], answers)
            ]
            fields = {"query": sides[0], "target": sides[1], "source": "made", "item": str(number)}
            writer.write(f"k{number}", {"json": json.dumps(fields).encode()}, languages=["en"], tokens=None)
    return str(folder)


def mined(folder, shards, tmp_path, *options):
    out = ["--out", str(tmp_path / "out"), "--name", "hard", "--margin", "0", "--workers", "1"]
    assert main(["negatives", shards, "--model", str(folder), *out, *options]) == 0
    dataset = Dataset.open(tmp_path / "out/text-triplets/hard")
    return [json.loads(dataset.read(number)["json"]) for number in range(len(dataset))]


def test_a_query_with_more_answers_than_neighbours_still_gets_its_negatives(text_tower, tmp_path):
    """Its own answers are the nearest; the first search finds nothing else."""
    draw = np.random.default_rng(0)
    popular = "red circle and blue star"
    rows = [(popular, [f"{popular} {' '.join(draw.choice(WORDS, 9))}"]) for _ in range(120)]
    rows += [(" ".join(draw.choice(WORDS, 8)), [" ".join(draw.choice(WORDS, 14))]) for _ in range(60)]
    found = mined(text_tower[0], write(tmp_path / "pairs", rows), tmp_path, "--ranks", "1", "20", "--count", "2")
    own = {answers[0] for query, answers in rows if query == popular}
    triplets = [sample for sample in found if sample["query"][0]["text"] == popular]
    assert len(triplets) > 100
    assert not own & {text["text"] for sample in triplets for texts in sample["negatives"] for text in texts}


def test_no_alternative_of_a_negative_is_or_nearly_is_an_answer(text_tower, tmp_path):
    draw = np.random.default_rng(1)
    shared = "nobody knows the answer to this question about the old white house on the hill, "
    shared += "and nobody ever will, say the neighbours"
    rows = [("what is it", [shared])]
    for number in range(40):
        query = " ".join(draw.choice(WORDS, 8))
        also = shared if number % 2 else shared.replace("old white", "old grey")  # nearly the same
        rows.append((query, [f"{query} {' '.join(draw.choice(WORDS, 3))}", also]))
    found = mined(text_tower[0], write(tmp_path / "pairs", rows), tmp_path, "--ranks", "1", "40", "--count", "3")
    assert len(found) > 20
    for sample in found:
        texts = [text["text"] for texts in sample["negatives"] for text in texts]
        assert len(texts) == 3
        assert not [text for text in texts if text.startswith("nobody knows")]


def test_neither_the_query_itself_nor_what_it_answers_is_a_negative(text_tower, tmp_path):
    """Pairs of equals, as of duplicate questions: the nearest text to a query is often itself, in another pair."""
    draw = np.random.default_rng(2)
    texts = [" ".join(draw.choice(WORDS, 14)) for _ in range(60)]
    loud = [f"{text.upper()}!" for text in texts]
    also = [f"{text} {draw.choice(WORDS)}" for text in texts]  # nearly the same
    rows = [(texts[n], [f"a text about {texts[n - 1]}", (loud, also, texts)[n % 3][n - 1]]) for n in range(60)]
    found = mined(text_tower[0], write(tmp_path / "pairs", rows), tmp_path, "--ranks", "1", "50")
    assert len(found) > 40
    for sample in found:
        own = texts.index(sample["query"][0]["text"])
        negatives = {text["text"] for texts in sample["negatives"] for text in texts}
        assert not {texts[own], loud[own], also[own]} & negatives  # itself
        assert not {texts[own - 1], loud[own - 1], also[own - 1]} & negatives  # its answer
        after = (own + 1) % 60
        if after % 3 != 1:  # its answer is this query, word for word
            assert not {texts[after], loud[after]} & negatives
