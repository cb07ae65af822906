"""What a figure means, of whatever name; and what counts as better."""

import numpy as np
import pytest
from stage_trainer.checkpoint.state import RunState
from stage_trainer.errors import UserError
from stage_trainer.evaluation import retrieval, text_retrieval
from stage_trainer.evaluation.cross_modal import recall
from stage_trainer.evaluation.measures import check_best, of_images, of_pairs, title_of_pairs
from stage_trainer.evaluation.sets import XTD10
from stage_trainer.metrics.measure import Measure
from stage_trainer.recipe.kinds import PAIRS
from stage_trainer.run.evaluation import better
from stage_trainer.tasks.pools import _recall

LOSS = "validation_loss_masked_lm/all"


@pytest.mark.parametrize(
    ("name", "higher_is_better"),
    [("validation_recall_at_5_glossary/text to image", True), ("validation_ndcg_at_10_loss/mean", True),
     ("modality_gap_of_mine", True), (LOSS, False), ("modality_gap/drawn", False), ("perplexity/all", False)],
)  # fmt: skip
def test_what_is_better_is_what_the_measure_says_whatever_its_name(name, higher_is_better):
    measures, state = {name: Measure(higher_is_better=higher_is_better)}, RunState({}, {}, {})
    found = [better({name: value}, measures, name, state) is not None for value in (0.5, 0.6, 0.4, 0.4, float("nan"))]
    assert found == ([True, True, False, False, False] if higher_is_better else [True, False, True, False, False])
    assert state.best["value"] == (0.6 if higher_is_better else 0.4)


def test_without_a_measure_that_counts_nothing_is_the_best():
    state = RunState({}, {}, {})
    assert better({"a": 0.1}, {"a": Measure()}, None, state) is None
    assert state.best is None


def test_the_best_by_another_measure_does_not_hold():
    measures = {"a": Measure(), LOSS: Measure(higher_is_better=False)}
    state = RunState({}, {}, {}, best={"metric": LOSS, "value": 7.0})
    assert better({"a": 0.1, LOSS: 8.0}, measures, "a", state) == {"metric": "a", "value": 0.1}


@pytest.mark.parametrize("texts", [{"en": ["a", "b", "c"]}, {"en": ["a", "b"], "de": ["x", "y"]}, {"de": ["x"]}])
@pytest.mark.parametrize("documents", [False, True])
def test_what_is_measured_of_images_is_what_was_announced(texts, documents):
    entries = {language: list(enumerate(of)) for language, of in texts.items()}
    pool = retrieval.Pool("loss", [b""] * 3, entries, documents)
    names, rng = pool.all_texts(), np.random.default_rng(0)
    vectors = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(len(names), 8)).astype(np.float32)
    embedded = retrieval.EmbeddedPool(*vectors, {text: row for row, text in enumerate(names)})
    announced = of_images("my/loss", texts, (8, 4), 8, documents=documents)
    assert set(_recall("my/loss", pool, embedded, (8, 4))) == set(announced)
    assert [m.higher_is_better for n, m in announced.items() if not n.startswith("modality_gap/")].count(False) == 0
    assert all(name.startswith(PAIRS.metrics) for name in announced)
    heads = {name for name, measure in announced.items() if measure.headline}
    assert all(f"{head}/4 dims" in announced and head.startswith("validation_") for head in heads)
    assert len(heads) == 2 + documents + (len(texts) == 2)


@pytest.mark.parametrize("more", [[], ["jp"]])
def test_a_published_set_is_also_measured_as_published_figures_are(more):
    """Equal captions are each right for their own image alone, and the mean is over the set's languages."""
    entries = {language: [(n, f"{language} {n // 2}") for n in range(12)] for language in [*XTD10, *more]}
    pool = retrieval.Pool("xtd10", [b""] * 12, entries)
    names, rng = pool.all_texts(), np.random.default_rng(0)
    vectors = rng.normal(size=(12, 8)).astype(np.float32), rng.normal(size=(len(names), 8)).astype(np.float32)
    embedded = retrieval.EmbeddedPool(*vectors, {text: row for row, text in enumerate(names)})
    found = _recall("mine", pool, embedded, (8, 4))
    assert set(found) == set(of_images("mine", entries, (8, 4), 8, documents=False, source="xtd10"))
    recalls = []
    for language in XTD10:
        captions = vectors[1][[embedded.row[text] for _, text in entries[language]]]
        recalls.append(recall(vectors[0], captions, range(12)))
    for value, way in zip(np.mean(recalls, axis=0), ("text to image", "image to text"), strict=True):
        assert found[f"validation_recall_at_5_mine, by CLIP_benchmark/{way}"] == pytest.approx(value, abs=1e-12)
    assert found["validation_recall_at_5_mine/text to image"] != pytest.approx(np.mean(recalls, axis=0)[0])
    del entries["tr"]  # a language less is another set
    assert not any(
        "CLIP_benchmark" in name for name in of_images("mine", entries, (8,), 8, documents=False, source="xtd10")
    )


@pytest.mark.parametrize("scored", [False, True])
def test_what_is_measured_of_pairs_is_what_was_announced(scored):
    queries = {"de": [(0, "a"), (1, "b")], "fr": [(1, "c")]}
    scores = [("a", 0, 1.0), ("b", 1, 0.5), ("c", 1, 0.2)] if scored else []
    pool = text_retrieval.PairPool("p", ["A", "B"], queries, scores)
    texts = pool.texts()
    lookup = text_retrieval.lookup(texts, np.random.default_rng(0).normal(size=(len(texts), 4)))
    announced = of_pairs("p", queries, scored=scored)
    assert {title_of_pairs("p", what) for what in text_retrieval.measure(pool, lookup)} == set(announced)
    assert all(name.startswith(PAIRS.metrics) for name in announced)
    heads = {name for name, measure in announced.items() if measure.headline}
    assert heads == {"validation_ndcg_at_10_p/mean", *(["validation_spearman_p/all"] if scored else [])}


def test_a_best_that_nothing_measures_is_refused_with_the_nearest():
    measures = {"validation_recall_at_5_drawn/text to image": Measure()}
    with pytest.raises(UserError, match="did you mean 'validation_recall_at_5_drawn/text to image'"):
        check_best("validation_recall_at_5_drawn/text_to_image", measures)
    with pytest.raises(UserError, match="what is: validation_recall"):
        check_best("wer", measures)
    with pytest.raises(UserError, match="no held-out data"):
        check_best("wer", None)
    check_best(None, None)
    check_best(*measures, measures)
