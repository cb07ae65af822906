"""ViDoRe: both readings of repeated questions, grades, languages; against pytrec_eval."""

import numpy as np
import pytest
import pytrec_eval
from stage_trainer.errors import UserError
from stage_trainer.evaluation.documents import LAST_PAGE, NDCG_5, NDCG_10, measure
from stage_trainer.evaluation.sets import SETS, find_sets

from .conftest import Known, jpg, random_vector


def trec(run: dict[str, np.ndarray], qrels: dict[str, dict[int, int]], name: str, k: int) -> float:
    """Mean nDCG of cosines with eight pages, by pytrec_eval; ids as data-prep makes them."""
    pages = np.stack([random_vector(jpg(n)) for n in range(8)]).astype("f")
    pages /= np.linalg.norm(pages, axis=1, keepdims=True)
    runs = {q: {f"{name}/{n}": float(s) for n, s in enumerate(pages @ (v / np.linalg.norm(v)))} for q, v in run.items()}
    judged = {q: {f"{name}/{page}": grade for page, grade in of.items()} for q, of in qrels.items()}
    found = pytrec_eval.RelevanceEvaluator(judged, {f"ndcg_cut_{k}"}).evaluate(runs)
    return float(np.mean([of[f"ndcg_cut_{k}"] for of in found.values()]))


def vectors(questions: list[str]) -> dict[str, np.ndarray]:
    return {question: random_vector(question).astype("f") for question in questions}


def test_version_1_in_both_readings_of_a_repeated_question(pages):
    texts = ["What is the title?", "How many?", "What is the title?", "Where?"]
    queries = [{"query-id": 10 + n, "query": text} for n, text in enumerate(texts)]
    out = pages("docvqa_test_subsampled_beir", queries, [(10, 1, 1), (11, 3, 1), (12, 6, 1), (13, 0, 1)])
    found = measure(Known(random_vector), SETS["DocQ"], find_sets(out)["DocQ"])
    run = vectors(["What is the title?", "How many?", "Where?"])
    name = "docvqa_test_subsampled_beir"
    for reading, title in ((NDCG_5, {1: 1, 6: 1}), (LAST_PAGE, {6: 1})):
        expected = trec(run, {"What is the title?": title, "How many?": {3: 1}, "Where?": {0: 1}}, name, 5)
        assert found.figures[reading]["DocQ"]["8"] == pytest.approx(expected, abs=1e-9)
    assert found.figures[NDCG_5] != found.figures[LAST_PAGE]
    assert found.counts == {"pages": 8, "queries": 3}
    assert "DocQ has 3 queries, the published set 451" in found.notes


@pytest.mark.parametrize(
    ("name", "measured", "k"), [("esg_reports_v2", NDCG_5, 5), ("vidore_v3_hr_mteb_format", NDCG_10, 10)]
)
def test_later_versions_have_grades_and_a_figure_for_each_language(pages, name, measured, k):
    queries = [
        {"query-id": 2 * n + k, "query": f"{language} {n}", "language": language}
        for n in range(3) for k, language in enumerate(("english", "french"))
    ]  # fmt: skip
    qrels = [(q, (3 * q + j) % 8, 1 + j) for q in range(6) for j in range(2)]
    out = pages(name, queries, qrels)
    known = SETS[name.removesuffix("_mteb_format")]
    found = measure(Known(random_vector), known, find_sets(out)[known.name])
    for k_, (code, language) in enumerate((("en", "english"), ("fr", "french"))):
        judged = {f"{language} {n}": {page: g for q, page, g in qrels if q == 2 * n + k_} for n in range(3)}
        expected = trec(vectors(list(judged)), judged, name, k)
        assert found.figures[measured][code]["8"] == pytest.approx(expected, abs=1e-9)
    assert list(found.figures) == [measured]
    missing = ", ".join(code for code in known.languages if code not in ("en", "fr"))
    assert f"{known.name} has no queries in {missing}" in found.notes[-1]


def test_two_queries_with_one_text_stay_two_where_ids_count(pages):
    queries = [{"query-id": n, "query": "the same", "language": "english"} for n in range(2)]
    out = pages("economics_reports_v2", queries, [(0, 1, 2), (1, 5, 1)])
    found = measure(Known(random_vector), SETS["economics_reports_v2"], find_sets(out)["economics_reports_v2"])
    assert found.counts["queries"] == 2


def test_a_perfect_model_has_one_and_pages_without_queries_are_candidates(pages):
    out = pages(
        "shiftproject_test_beir", [{"query-id": n, "query": f"{n}"} for n in range(4)], [(n, n, 1) for n in range(4)]
    )
    pictures = {jpg(n): n for n in range(8)}
    model = Known(lambda item: np.eye(8)[pictures[item] if isinstance(item, bytes) else int(item)])
    found = measure(model, SETS["Shift"], find_sets(out)["Shift"])
    assert found.figures[NDCG_5]["Shift"]["8"] == 1.0
    blind = Known(lambda item: np.eye(8)[pictures[item] if isinstance(item, bytes) else 7 - int(item)])
    assert measure(blind, SETS["Shift"], find_sets(out)["Shift"]).figures[NDCG_5]["Shift"]["8"] < 1


def test_a_set_in_other_languages_is_refused(pages):
    out = pages("biomedical_lectures_v2", [{"query-id": 0, "query": "q", "language": "korean"}], [(0, 0, 1)])
    with pytest.raises(UserError, match="has queries in ko; biomedical_lectures_v2 is measured in de, en, es, fr"):
        measure(Known(random_vector), SETS["biomedical_lectures_v2"], find_sets(out)["biomedical_lectures_v2"])
