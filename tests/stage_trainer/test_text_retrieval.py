import json

import numpy as np
import pytest
import pytrec_eval
from data_prep.shards import DatasetWriter
from scipy import stats
from stage_trainer.evaluation.text_retrieval import PairPool, measure
from stage_trainer.metrics.retrieval import ndcg_at_k
from stage_trainer.metrics.sts import spearman


def text(words, language):
    return {"text": words, "language": language, "origin": "human", "role": "name"}


@pytest.fixture
def pool(tmp_path):
    rows = [
        ("a", [text("dog", "en"), text("Hund", "de")], 5.0),
        ("b", [text("cat", "en"), text("Katze", "de")], 3.0),
        ("c", [text("cat", "en"), text("Kater", "de")], 1.0),
    ]
    with DatasetWriter(tmp_path / "pairs", kind="text-pairs", source="pairs") as writer:
        for name, texts, score in rows:
            content = {"query": texts, "target": texts, "item": name, "score": score}
            writer.write(name, {"json": json.dumps(content).encode()}, languages=["en", "de"], tokens=None)
    return PairPool.open(tmp_path / "pairs")


def test_each_languages_queries_look_for_the_english_target(pool):
    assert pool.targets == ["Hund", "dog", "Katze", "cat", "Kater"]
    assert pool.queries == {"de": [(1, "Hund"), (3, "Katze"), (3, "Kater")], "en": [(0, "dog"), (2, "cat"), (4, "cat")]}
    assert pool.texts() == ["Hund", "Kater", "Katze", "cat", "dog"]


def test_the_figures_are_those_of_ranks_counted_by_hand(pool):
    place = {"Hund": 0, "dog": 0.1, "cat": 2.1, "Katze": 2.2, "Kater": 2.4}
    unit = np.stack([np.cos(list(place.values())), np.sin(list(place.values()))], axis=1)
    rows = dict(zip(place, unit, strict=True))
    found = measure(pool, lambda texts: np.stack([rows[t] for t in texts]))
    # "Hund" and "Katze" are nearest to their English words; to "Kater" (2.4) "Katze" (2.2) is nearer than "cat" (2.1).
    assert found["ndcg_at_10/de"] == pytest.approx((1 + 1 + 1 / np.log2(3)) / 3)
    assert found["ndcg_at_10/en"] == pytest.approx(1.0), "both cats are right for cat"
    assert found["ndcg_at_10/mean"] == pytest.approx((found["ndcg_at_10/de"] + found["ndcg_at_10/en"]) / 2)
    assert -1 <= found["spearman"] <= 1


def test_ndcg_and_spearman_equal_independent_implementations():
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores = generator.standard_normal(30).astype(np.float32)
        relevant = set(generator.choice(30, size=int(generator.integers(1, 15)), replace=False).tolist())
        evaluator = pytrec_eval.RelevanceEvaluator({"q": {str(i): 1 for i in relevant}}, {"ndcg_cut_10"})
        theirs = evaluator.evaluate({"q": {str(i): float(s) for i, s in enumerate(scores)}})["q"]["ndcg_cut_10"]
        assert ndcg_at_k(scores, relevant) == pytest.approx(theirs, rel=1e-6)
        a, b = generator.integers(0, 6, 40).astype(float), generator.standard_normal(40)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-9)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))
