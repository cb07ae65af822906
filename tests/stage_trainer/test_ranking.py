"""Rankings and what trec_eval computes from them: parts, ties, grades, candidates that are left out; theory."""

import numpy as np
import pytest
import pytrec_eval
import torch
from stage_trainer.metrics.ranking import Best, best, hits, ndcg

QUERIES, CANDIDATES = 50, 40


@pytest.fixture(params=["ties", "none"])
def drawn(request):
    """Queries, candidates, and grades from -1 to 3, of which two queries have none above 0."""
    rng = np.random.default_rng(0)
    if request.param == "ties":
        queries, candidates = (rng.integers(-2, 3, (n, 3)).astype("f") for n in (QUERIES, CANDIDATES))
    else:
        queries, candidates = (rng.normal(size=(n, 3)).astype("f") for n in (QUERIES, CANDIDATES))
    grades = [
        {int(c): int(g) for c, g in zip(rng.choice(CANDIDATES, 6, False), rng.integers(-1, 4, 6), strict=True)}
        for _ in range(QUERIES)
    ]
    grades[:2] = [dict.fromkeys(of, 0) for of in grades[:2]]
    return queries, candidates, grades


def trec(queries, candidates, grades, measure, left_out=()):
    run = {
        f"q{q}": {f"d{c:03}": float(s) for c, s in enumerate(scores) if (q, c) not in left_out}
        for q, scores in enumerate(queries @ candidates.T)
    }
    judged = {f"q{q}": {f"d{c:03}": grade for c, grade in of.items()} for q, of in enumerate(grades)}
    found = pytrec_eval.RelevanceEvaluator(judged, {measure}).evaluate(run)
    return [found[f"q{q}"][measure] for q in range(len(queries))]


def test_graded_ndcg_and_hits_are_trec_evals_ties_included(drawn):
    queries, candidates, grades = drawn
    found = best(queries, candidates, 10)
    for k in (5, 10):
        assert ndcg(found, grades, k) == pytest.approx(trec(*drawn, f"ndcg_cut_{k}"), abs=1e-12)
    relevant = [{candidate for candidate, grade in of.items() if grade > 0} for of in grades]
    assert hits(found[:, :5], relevant) == pytest.approx(np.mean(trec(*drawn, "success_5")), abs=1e-12)


def test_candidates_in_parts_and_in_any_order_are_ranked_as_at_once(drawn):
    """And what a query may not find is not found, even if nothing else is left."""
    queries, candidates, grades = drawn
    own = np.arange(QUERIES) % CANDIDATES
    found = Best(torch.from_numpy(queries), 10, torch.from_numpy(own))
    for part in np.array_split(np.random.default_rng(1).permutation(CANDIDATES), 7):
        found.add(torch.from_numpy(candidates[part]), torch.from_numpy(part))
    expected = trec(*drawn, "ndcg_cut_10", {(q, int(c)) for q, c in enumerate(own)})
    assert ndcg(found.ranks(), grades, 10) == pytest.approx(expected, abs=1e-12)
    alone = Best(torch.ones(1, 2), 10, torch.tensor([0]))
    alone.add(torch.ones(2, 2), torch.arange(2))
    assert alone.ranks().tolist() == [[1, -1]]


def test_negative_zero_equals_zero_and_order_is_that_of_numbers():
    scores = np.array([-np.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 3.0, np.inf], np.float32)
    found = best(np.ones((1, 1), "f"), scores[[4, 0, 6, 3, 2, 7, 1, 5], None], 8)
    assert found.tolist() == [[5, 2, 7, 3, 0, 4, 6, 1]]


def test_a_random_model_has_the_ndcg_that_theory_gives():
    rng = np.random.default_rng(2)
    found = best(rng.normal(size=(4000, 8)).astype("f"), rng.normal(size=(100, 8)).astype("f"), 10)
    values = ndcg(found, [{int(right): 1.0} for right in rng.integers(0, 100, 4000)], 10)
    assert values.mean() == pytest.approx(sum(1 / np.log2(place + 2) for place in range(10)) / 100, abs=0.006)
