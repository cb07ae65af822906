import numpy as np
import pytest
import pytrec_eval
from stage_trainer.evaluation import retrieval
from stage_trainer.evaluation.ranks import part_of
from stage_trainer.evaluation.retrieval import EmbeddedPool, Pool, ndcg, score
from stage_trainer.evaluation.tables import table
from stage_trainer.metrics.retrieval import chance_at_k, recall_at_k


def test_recall_counts_queries_with_a_hit_among_the_nearest():
    candidates = np.eye(6, dtype=np.float32)
    queries = candidates[[0, 1, 2]] + 0.1 * candidates[[3, 4, 5]]
    relevant = np.zeros((3, 6), bool)
    relevant[0, 0] = relevant[1, 4] = relevant[2, 3] = True
    assert recall_at_k(queries, candidates, relevant, 1) == pytest.approx(1 / 3)
    assert recall_at_k(queries, candidates, relevant, 2) == pytest.approx(2 / 3)


def test_recall_agrees_with_sorting_by_hand():
    rng = np.random.default_rng(0)
    queries, candidates = rng.normal(size=(40, 8)), rng.normal(size=(60, 8))
    relevant = rng.random((40, 60)) < 0.03
    ranks = np.argsort(np.argsort(-(queries @ candidates.T), axis=1), axis=1)
    by_hand = np.mean([(ranks[i][relevant[i]] < 5).any() for i in range(40)])
    assert recall_at_k(queries, candidates, relevant) == pytest.approx(by_hand)


def test_chance_is_what_random_vectors_reach():
    rng = np.random.default_rng(1)
    relevant = np.zeros((2000, 50), bool)
    relevant[np.arange(2000), rng.integers(0, 50, 2000)] = True
    relevant[:500, 7] = True
    reached = recall_at_k(rng.normal(size=(2000, 16)), rng.normal(size=(50, 16)), relevant)
    assert chance_at_k(relevant) == pytest.approx(reached, abs=0.03)


def test_a_text_that_two_images_share_is_right_for_both():
    pool = Pool("p", [b""] * 7, {"en": [(i, "duck" if i < 2 else f"t{i}") for i in range(7)], "de": [(1, "Ente")]})
    names = pool.all_texts()
    rng = np.random.default_rng(2)
    images = rng.normal(size=(7, 8)).astype(np.float32)
    texts = rng.normal(size=(len(names), 8)).astype(np.float32)
    row = {t: i for i, t in enumerate(names)}
    texts[row["duck"]] = images[1] * 3
    texts[row["Ente"]] = texts[row["duck"]] * 0.5
    recalls, chances = score(pool, EmbeddedPool(images, texts, row), [8, 4])
    assert recalls["text→English text"]["8"]["de"] == 1.0
    assert recalls["text→image"]["8"]["de"] == 1.0
    assert set(recalls["text→image"]) == {"8", "4"}
    assert chances["text→English text"]["chance"]["de"] == pytest.approx(5 / 6)
    assert "en" not in recalls["text→English text"]["8"]


def test_pages_are_ranked_as_pytrec_eval_ranks_them():
    """ViDoRe's measure. A query may have several pages, and pages nobody asks for are candidates."""
    rng = np.random.default_rng(4)
    asked = {"en": [(i % 9, f"q{i % 12}") for i in range(20)], "fr": [(i, f"f{i}") for i in range(5)]}
    pool = Pool("p", [b""] * 15, asked, documents=True)
    names = pool.all_texts()
    images, texts = rng.normal(size=(15, 8)), rng.normal(size=(len(names), 8))
    row = {text: i for i, text in enumerate(names)}
    found = ndcg(pool, EmbeddedPool(images, texts, row), [8, 4])["text→image"]
    for dim in (8, 4):
        for language, entries in asked.items():
            relevance: dict[str, dict[str, int]] = {}
            for page, query in entries:
                relevance.setdefault(query, {})[str(page)] = 1
            run = {}
            for query in relevance:
                vector = texts[row[query], :dim]
                cosines = images[:, :dim] @ vector / np.linalg.norm(images[:, :dim], axis=1) / np.linalg.norm(vector)
                run[query] = {str(page): float(value) for page, value in enumerate(cosines)}
            theirs = pytrec_eval.RelevanceEvaluator(relevance, {"ndcg_cut_5"}).evaluate(run)
            expected = np.mean([each["ndcg_cut_5"] for each in theirs.values()])
            assert found[str(dim)][language] == pytest.approx(expected, rel=1e-6)
        assert found[str(dim)]["mean"] == pytest.approx((found[str(dim)]["en"] + found[str(dim)]["fr"]) / 2)
    recalls, chances = score(pool, EmbeddedPool(images, texts, row), [8, 4])
    chance = {direction: of["chance"] for direction, of in chances.items() if of}
    shown = {"images": 15, "recall_at_5": recalls, "chance": chance, "ndcg_at_5": {"text→image": found}}
    assert f"text→image, nDCG@5  {100 * found['8']['mean']:6.1f}" in table({"p": shown})


def test_all_captions_of_an_image_are_queries_and_any_of_them_is_right_for_it(monkeypatch):
    # So that there are several parts, one of them cut.
    monkeypatch.setattr("stage_trainer.metrics.retrieval._QUERIES", 7)
    rng = np.random.default_rng(3)
    images = rng.normal(size=(40, 6)).astype(np.float32)
    captions = [(number, f"caption {k} of {number}") for number in range(40) for k in range(number % 5 + 1)]
    vectors = {
        text: (images[number] + rng.normal(size=6) * 1.2).astype(np.float32) for number, text in sorted(captions)
    }
    pool = Pool("p", [b""] * 40, {"en": captions})
    names = pool.all_texts()
    row = {text: i for i, text in enumerate(names)}
    recalls, _ = score(pool, EmbeddedPool(images, np.stack([vectors[text] for text in names]), row), [6])

    def cosine(one, two):
        return (
            sum(a * b for a, b in zip(one, two, strict=True))
            / (sum(a * a for a in one) * sum(b * b for b in two)) ** 0.5
        )

    found = shown = 0
    for number, text in captions:
        nearest = sorted(range(40), key=lambda i: -cosine(vectors[text], images[i]))[:5]
        found += number in nearest
    for number in range(40):
        nearest = sorted(captions, key=lambda entry: -cosine(images[number], vectors[entry[1]]))[:5]
        shown += any(owner == number for owner, _ in nearest)
    assert 0 < found < len(captions)
    assert 0 < shown < 40
    assert recalls["text→image"]["6"]["en"] == pytest.approx(found / len(captions))
    assert recalls["image→text"]["6"]["en"] == pytest.approx(shown / 40)


class Lengths:
    """A model, and its towers, whose embedding of an item is its length."""

    def encode(self, texts, **options):
        return np.array([[len(text)] for text in texts], np.float32).reshape(-1, 1)

    @property
    def text(self):
        return self


@pytest.mark.parametrize("images", [0, 1, 4, 5, 9])
def test_all_ranks_hear_of_an_end_before_every_batch_and_as_often(images, monkeypatch):
    monkeypatch.setattr(retrieval, "BATCH", 2)
    monkeypatch.setattr(retrieval, "rows_together", lambda own, sizes: own)
    counts, parts = [], [part_of(images, rank, 2) for rank in range(2)]
    for rank in range(2):
        heard = []
        mine = [b"i" * n for n in parts[rank]]
        retrieval._embed(Lengths().encode, mine, list(map(len, parts)), lambda heard=heard: heard.append(1))
        counts.append(len(heard))
    assert counts == [{0: 1, 1: 1, 4: 1, 5: 2, 9: 3}[images]] * 2


def test_texts_are_embedded_in_batches_and_given_in_their_order(monkeypatch):
    monkeypatch.setattr(retrieval, "BATCH", 2)
    texts, heard = ["aaa", "a", "aaaaa", "", "aa"], []
    found = retrieval.embed_texts(Lengths(), texts, before_batch=lambda: heard.append(1))
    assert found[:, 0].tolist() == [3, 1, 5, 0, 2]
    assert len(heard) == 3
