"""Captioned photos by CLIP_benchmark's protocol: its formula, theory, languages, first captions."""

import numpy as np
import pytest
import pytrec_eval
import torch
from stage_trainer.errors import UserError
from stage_trainer.evaluation.cross_modal import IMAGE_TO_TEXT, TEXT_TO_IMAGE, measure, recall
from stage_trainer.evaluation.sets import SETS, XM3600, XTD10, find_sets

from .conftest import Known, jpg, random_vector


def clip_benchmark(images: np.ndarray, captions: np.ndarray, image_of: list[int], k: int) -> tuple[float, float]:
    """LAION CLIP_benchmark's image_retrieval_recall@k and text_retrieval_recall@k, in its own arithmetic."""
    scores = torch.from_numpy(captions) @ torch.from_numpy(images).T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), image_of] = True

    def of(scores: torch.Tensor, positive: torch.Tensor) -> float:
        hits = positive.gather(1, scores.topk(k, dim=1).indices).sum(1)
        return (hits / positive.sum(1) > 0).double().mean().item()

    return of(scores, positive), of(scores.T, positive.T)


def test_recall_is_clip_benchmarks_with_unequal_numbers_of_captions():
    rng = np.random.default_rng(0)
    image_of = [image for image in range(30) for _ in range(1 + image % 5)]
    images = rng.normal(size=(30, 6)).astype(np.float32)
    captions = (images[image_of] + rng.normal(size=(len(image_of), 6)) * 1.5).astype(np.float32)
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, captions)]
    assert recall(images, captions, image_of) == pytest.approx(clip_benchmark(*units, image_of, 5), abs=1e-12)


def test_recall_with_equal_scores_is_trec_evals_success_at_5():
    rng = np.random.default_rng(1)
    images, captions = (np.eye(3, dtype="f")[rng.integers(0, 3, n)] for n in (20, 60))
    image_of = [n % 20 for n in range(60)]
    scores = captions @ images.T
    qrels = {f"q{n}": {f"{image:03}": 1} for n, image in enumerate(image_of)}
    run = {f"q{n}": {f"{i:03}": float(s) for i, s in enumerate(row)} for n, row in enumerate(scores)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"success_5"}).evaluate(run)
    expected = np.mean([of["success_5"] for of in theirs.values()])
    assert recall(images, captions, image_of)[0] == pytest.approx(expected, abs=1e-12)


def test_chance_and_perfection_are_what_theory_says():
    """A random model finds one of 200 images among 5 of them in a fortieth of cases; with five captions an image is
    found as 1 - C(195·5, 5)/C(1000, 5) says."""
    rng = np.random.default_rng(2)
    image_of = [n // 5 for n in range(1000)]
    tries = [recall(rng.normal(size=(200, 16)).astype("f"), rng.normal(size=(1000, 16)).astype("f"), image_of)
             for _ in range(4)]  # fmt: skip
    there, back = np.mean(tries, axis=0)
    assert there == pytest.approx(5 / 200, abs=0.01)
    assert back == pytest.approx(1 - np.prod([(995 - n) / (1000 - n) for n in range(5)]), abs=0.02)
    exact = rng.normal(size=(200, 16)).astype("f")
    assert recall(exact, exact[image_of], image_of) == (1.0, 1.0)


def test_crossmodal_3600_is_its_26_languages_by_the_first_caption(photos):
    """A model for which the second captions alone are right finds nothing: 6 images, of which it ranks its own last."""
    pictures = {jpg(n): n for n in range(6)}

    def vector(item):
        if isinstance(item, bytes):
            return np.eye(8)[pictures[item]]
        number = int(item.split()[1])
        return np.eye(8)[number] if "again" in item else -np.eye(8)[number]

    found = measure(Known(vector), SETS["Crossmodal-3600"], find_sets(photos)["Crossmodal-3600"])
    assert set(found.figures[TEXT_TO_IMAGE]) == set(found.figures[IMAGE_TO_TEXT]) == set(XM3600)
    assert {dims["8"] for rows in found.figures.values() for dims in rows.values()} == {0.0}
    assert found.counts == {"images": 6, "texts": 6 * 26, "languages": 26}
    assert not found.whole
    assert "Crossmodal-3600 has 6 images, the published set 3,600" in found.notes


def test_each_set_is_measured_in_its_languages_at_every_dim(photos):
    sets = find_sets(photos)
    assert set(sets) == {"Flickr30K", "MS COCO", "Crossmodal-3600", "multilingual MS COCO"}
    model = Known(random_vector)
    xtd = measure(model, SETS["multilingual MS COCO"], sets["multilingual MS COCO"])
    assert set(xtd.figures[TEXT_TO_IMAGE]) == set(XTD10)  # not Japanese, which LAION's files have, too
    flickr = measure(model, SETS["Flickr30K"], sets["Flickr30K"])
    assert flickr.counts == {"images": 6, "texts": 30, "languages": 1}
    images = np.stack([random_vector(jpg(n)) for n in range(6)]).astype("f")
    captions = np.stack([random_vector(f"Flickr {n}, sentence {k} .") for n in range(6) for k in range(5)]).astype("f")
    for dim in (8, 4):
        x, y = images[:, :dim], captions[:, :dim]
        units = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y)]
        expected = clip_benchmark(*units, [n // 5 for n in range(30)], 5)
        shown = [flickr.figures[way]["en"][str(dim)] for way in (TEXT_TO_IMAGE, IMAGE_TO_TEXT)]
        assert shown == pytest.approx(expected, abs=1e-12)


def test_an_equal_caption_of_another_image_is_a_miss():
    images = np.eye(7, dtype="f")
    captions = images[[0, 0, 2, 3, 4, 5, 6]]  # the second image's caption says what the first one's says
    there, _ = recall(images, captions, list(range(7)), k=1)
    assert there == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        (lambda item: np.ones(8), "all the same"),
        (lambda item: np.zeros(8), "zero"),
        (lambda item: np.full(8, np.nan), "not finite"),
        (lambda item: random_vector(item) * (np.inf if item == "de coco 3" else 1), "not finite"),
    ],
)
def test_embeddings_that_rank_nothing_are_refused(photos, vector, said):
    with pytest.raises(UserError, match=f"known: its embeddings of .* are {said}"):
        measure(Known(vector), SETS["multilingual MS COCO"], find_sets(photos)["multilingual MS COCO"])
