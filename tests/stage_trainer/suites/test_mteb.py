"""The object that mteb calls, on local made tasks: figures against pytrec_eval, scipy and CLIP_benchmark."""

import mteb
import numpy as np
import pytest
import pytrec_eval
import scipy.stats
import torch
from datasets import Dataset, DatasetDict
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.mocks import MOCK_MIEB_TASK_REGISTRY, MOCK_TASK_REGISTRY
from mteb.models.cache_wrappers import CachedEmbeddingWrapper
from PIL import Image
from stage_trainer import mteb_model
from stage_trainer.errors import UserError
from stage_trainer.evaluation import mteb_model as adapter
from stage_trainer.evaluation.models import BATCH
from stage_trainer.evaluation.mteb_run import asked_tasks, check_modalities
from vision_tower import load_image

from .conftest import Known, random_vector

EXACT = 1e-12
MOCKS = ("MockRetrievalTask", "MockSTSTask", "MockInstructionRetrieval", "MockClassificationTask")
MOCKS_OF_IMAGES = ("MockAny2AnyRetrievalT2I", "MockAny2AnyRetrievalI2T", "MockZeroShotClassification", "MockVisualSTS")


def signs(item: object) -> np.ndarray:
    """±1, sixteen times: cosines are exact in float32, and many of them are equal."""
    return np.sign(random_vector(item, 16))


def metadata(name: str, kind: str, category: str, main: str) -> TaskMetadata:
    return TaskMetadata(
        name=name, description="made", reference=None, dataset={"path": "made", "revision": "1"}, type=kind,
        category=category, modalities=["text", "image"] if "i" in category else ["text"], eval_splits=["test"],
        eval_langs=["eng-Latn"], main_score=main, date=None, domains=None, task_subtypes=None, license=None,
        annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None,
    )  # fmt: skip


def retrieval(queries: dict, corpus: dict, qrels: dict, kind="Retrieval", category="t2t") -> AbsTaskRetrieval:
    """A task of texts, or of images where the values are pictures."""

    def rows(items: dict) -> Dataset:
        column = "text" if isinstance(next(iter(items.values())), str) else "image"
        return Dataset.from_dict({"id": list(items), column: list(items.values())})

    class Made(AbsTaskRetrieval):
        metadata = globals()["metadata"](f"Made{category.upper()}{kind}", kind, category, "ndcg_at_10")

        def load_data(self, num_proc=None, **kwargs):
            data = RetrievalSplitData(queries=rows(queries), corpus=rows(corpus), relevant_docs=qrels, top_ranked=None)
            self.dataset, self.data_loaded = {"default": {"test": data}}, True

    return Made()


def scores(model, task) -> dict:
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return result.task_results[0].scores["test"][0]


def picture(number: int, size=(12, 8)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def of_picture(vector):
    """A vector of the pixels, so that a picture has one in whatever form it comes."""
    return lambda item: vector(load_image(item).tobytes() if isinstance(item, bytes) else item)


def trec_eval(rows: dict, qrels: dict, measure: str, of=signs) -> float:
    """The mean over queries of a ranking of all documents by exact cosine."""
    queries, corpus = rows
    units = {name: of(item) / np.linalg.norm(of(item)) for name, item in (queries | corpus).items()}
    run = {q: {d: float(units[q] @ units[d]) for d in corpus} for q in queries}
    found = pytrec_eval.RelevanceEvaluator(qrels, {measure}).evaluate(run)
    return float(np.mean([of[measure.replace(".", "_")] for of in found.values()]))


def test_graded_retrieval_with_ties_is_trec_evals():
    draw = np.random.default_rng(0)
    queries = {f"q{n}": f"query {n}" for n in range(9)}
    corpus = {f"d{n}": f"document {n}" for n in range(40)}
    qrels = {q: {f"d{d}": int(draw.integers(0, 4)) for d in draw.choice(40, 6, replace=False)} for q in queries}
    qrels = {q: {d: g for d, g in of.items() if g} for q, of in qrels.items()}
    found = scores(adapter.load(Known(signs, (16,))), retrieval(queries, corpus, qrels))
    for ours, theirs in {"ndcg_at_10": "ndcg_cut.10", "ndcg_at_5": "ndcg_cut.5", "recall_at_5": "recall.5"}.items():
        expected = trec_eval((queries, corpus), qrels, theirs)  # mteb rounds means to five digits
        assert 0.02 < expected < 0.9
        assert found[ours] == pytest.approx(round(expected, 5), abs=EXACT)
    cosines = [signs("query 0") @ signs(text) for text in corpus.values()]
    assert len(set(cosines)) < len(cosines) / 2, "the data should have ties"


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_hits_with_ties_are_trec_evals_and_without_ties_clip_benchmarks(direction):
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k

    images = {f"i{n}": picture(n) for n in range(20)}
    image_of = [n for n in range(20) for _ in range(1 + n % 5)]
    texts = {f"t{n}": f"caption {n}" for n in range(len(image_of))}
    qrels: dict[str, dict[str, int]] = {}
    for caption, image in enumerate(image_of):
        query, document = (f"t{caption}", f"i{image}") if direction == "t2i" else (f"i{image}", f"t{caption}")
        qrels.setdefault(query, {})[document] = 1
    queries, corpus = (texts, images) if direction == "t2i" else (images, texts)
    task = retrieval(queries, corpus, qrels, "Any2AnyRetrieval", direction)

    def pixels(vector):
        return lambda item: vector(item if isinstance(item, str) else item.tobytes())

    found = scores(adapter.load(Known(of_picture(signs), (16,))), task)["hit_rate_at_5"]
    expected = trec_eval((queries, corpus), qrels, "success.5", pixels(signs))
    assert found == pytest.approx(round(expected, 5), abs=EXACT)

    found = scores(adapter.load(Known(of_picture(random_vector), (8,))), task)["hit_rate_at_5"]
    rows = [torch.tensor(np.stack([pixels(random_vector)(item) for item in of.values()])) for of in (texts, images)]
    both = torch.nn.functional.normalize(rows[0], dim=-1) @ torch.nn.functional.normalize(rows[1], dim=-1).T
    right = torch.zeros_like(both, dtype=torch.bool)
    right[torch.arange(len(both)), image_of] = True
    if direction == "i2t":
        both, right = both.T, right.T
    theirs = (recall_at_k(both, right, 5) > 0).double().mean().item()
    assert 0.1 < theirs < 0.9
    assert found == pytest.approx(round(theirs, 5), abs=EXACT)


def test_similarity_of_texts_with_ties_is_scipys_spearman():
    class Pairs(AbsTaskSTS):
        metadata = globals()["metadata"]("MadeSTS", "STS", "t2t", "cosine_spearman")
        min_score, max_score = 0, 5

        def load_data(self, num_proc=None, **kwargs):
            rows = Dataset.from_dict({"sentence1": left, "sentence2": right, "score": said})
            self.dataset, self.data_loaded = DatasetDict({"test": rows}), True

    left, right = [f"left {n}" for n in range(50)], [f"right {n}" for n in range(50)]
    said = np.random.default_rng(1).integers(0, 6, 50).astype(float).tolist()
    found = scores(adapter.load(Known(signs, (16,))), Pairs())
    cosines = [signs(a) @ signs(b) / 16 for a, b in zip(left, right, strict=True)]
    assert len(set(cosines)) < 20
    assert found["cosine_spearman"] == pytest.approx(scipy.stats.spearmanr(cosines, said).statistic, abs=EXACT)
    assert found["cosine_pearson"] == pytest.approx(scipy.stats.pearsonr(cosines, said).statistic, abs=1e-6)


def test_mtebs_own_mock_tasks_of_each_kind_run(export):
    model, tasks = mteb_model(export), {**MOCK_TASK_REGISTRY, **MOCK_MIEB_TASK_REGISTRY}
    for name in MOCKS + MOCKS_OF_IMAGES:
        assert "main_score" in scores(model, tasks[name]())


@pytest.mark.full
def test_all_of_mtebs_own_mock_tasks_pass(export):
    for dim in (None, 8):
        found = mteb.mock_run(mteb_model(export, dim=dim))
        assert found.all_passed, found.to_markdown()


def test_the_card_says_what_the_model_takes_and_its_dims(export):
    model = mteb_model(export, dim=8, max_length=32)
    card = model.mteb_model_meta
    assert card.modalities == ["text", "image"]
    assert adapter.meta_of(model.embedder).embed_dim == [16, 8]
    assert (model.dim, card.embed_dim) == (8, 8)
    assert card.revision == model.embedder.fingerprint
    assert card.name == f"local/small-{card.revision[:12]}"
    assert card.experiment_kwargs["max_length"] == "32"
    assert card.experiment_kwargs["embed_dim"] == 8
    assert adapter.meta_of(Known(signs, (16,), sees=False)).modalities == ["text"]
    for name, expected in {
        "jinaai/jina-clip-v2": "jinaai/jina-clip-v2", "open_clip:ViT-B-32/openai": "open_clip/ViT-B-32-openai",
        "runs/my run/stage 3/": "local/stage-3",
    }.items():  # fmt: skip
        assert adapter.meta_of(Known(signs, (16,), name=name)).name == f"{expected}-{'0' * 12}"
    assert (
        mteb_model(export, dim=16).mteb_model_meta.experiment_name == mteb_model(export).mteb_model_meta.experiment_name
    )
    with pytest.raises(UserError, match="has no dim 5; it has 16, 8"):
        mteb_model(export, dim=5)
    with pytest.raises(UserError, match="opened with other settings .max_length."):
        adapter.meta_of(model.embedder).load_model(max_length=64)


def test_weights_and_every_setting_change_where_results_are_kept():
    def place(dim=None, settings=None, **more):
        known = Known(signs, (16, 8), **({"fingerprint": "a" * 64} | more))
        known.settings |= settings or {}
        return mteb.ResultCache("cache").get_task_result_path("T", adapter.load(known, dim).mteb_model_meta)

    places = [place(), place(fingerprint="b" * 64), place(name="other"), place(8), place(settings={"max_length": "77"})]
    places.append(place(settings={"computes in": "bfloat16"}))
    instructions = ("a/b: ", "a:b: ", "查询：", "搜索：", "长" * 400)
    places += [place(settings={"instruction of queries": repr(words)}) for words in instructions]
    assert len(set(places)) == len(places)
    assert all(len(part.encode()) < 256 for path in places for part in path.parts)


def test_neither_of_mtebs_caches_mixes_models_of_one_name(tmp_path):
    task = retrieval(
        {"q1": "one", "q2": "two"}, {f"d{n}": f"text {n}" for n in range(9)}, {"q1": {"d3": 1}, "q2": {"d5": 1}}
    )

    def found(vector, fingerprint, cached):
        model = adapter.load(Known(vector, (8,), fingerprint=fingerprint * 64))
        if cached:
            model = CachedEmbeddingWrapper(model, tmp_path / "embeddings")
        cache = None if cached else mteb.ResultCache(tmp_path / "results")
        result = mteb.evaluate(model, task, cache=cache, co2_tracker=False, show_progress_bar=False)
        return result.task_results[0].scores["test"][0]["mrr_at_10"]

    def other(item):
        return random_vector(f"other {item}")

    expected = [found(vector, "a", cached=False) for vector in (random_vector,)]
    expected.append(scores(adapter.load(Known(other, (8,))), task)["mrr_at_10"])
    assert expected[0] != expected[1]
    assert found(other, "b", cached=False) == expected[1]
    assert [found(random_vector, "a", cached=True), found(other, "b", cached=True)] == expected
    assert found(other, "a", cached=True) == expected[0], "the same weights should come from the cache"


class Watched(Known):
    """Notes the texts that it is asked for, as (text, whether it is a query)."""

    def _texts(self, texts, query):
        self.asked = [*getattr(self, "asked", []), *((text, query) for text in texts)]
        return super()._texts(texts, query)


@pytest.mark.parametrize(("kind", "category", "instructed"), [
    ("Retrieval", "t2t", True), ("DocumentUnderstanding", "t2i", True), ("Any2AnyRetrieval", "t2i", False),
])  # fmt: skip
def test_queries_of_texts_and_pages_get_the_instruction_and_captions_do_not(kind, category, instructed):
    known = Watched(of_picture(random_vector))
    corpus = {f"d{n}": picture(n) if category == "t2i" else f"text {n}" for n in range(3)}
    scores(adapter.load(known), retrieval({"q": "a query"}, corpus, {"q": {"d1": 1}}, kind, category))
    assert ("a query", instructed) in known.asked
    assert not any(query for text, query in known.asked if text != "a query")


def batches(**columns):
    return [columns]


def encode(model, inputs, **more):
    of = metadata("MadeT", "Any2AnyRetrieval", "t2i", "ndcg_at_10")
    return model.encode(inputs, task_metadata=of, hf_split="test", hf_subset="default", **more)


def test_pictures_of_every_mode_are_embedded_as_our_own_reading_embeds_them(export):
    pictures = [picture(n, (31, 22)) for n in range(6)]
    pictures[1].putalpha(120)
    for number, mode in ((2, "L"), (3, "P"), (4, "CMYK"), (5, "1")):
        pictures[number] = pictures[number].convert(mode)
    model = mteb_model(export, dim=8)
    expected = model.embedder.model.encode_image([load_image(image) for image in pictures], truncate_dim=8)
    found = encode(model, batches(image=pictures))
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    with pytest.raises(ValueError, match="31x22 pixels"):
        encode(mteb_model(export, max_pixels=600), batches(image=pictures))


def test_a_text_with_an_image_is_the_sum_of_both_and_the_text_alone_for_a_model_without_images():
    known, blind = Known(of_picture(random_vector)), Known(random_vector, sees=False)
    both = {"text": ["one", "two"], "image": [picture(1), picture(2)]}
    texts, images = (encode(adapter.load(known), batches(**{key: both[key]})) for key in both)
    assert np.abs(encode(adapter.load(known), batches(**both)) - texts - images).max() < 1e-6
    assert np.abs(encode(adapter.load(blind), batches(**both)) - texts).max() < 1e-6
    with pytest.raises(UserError, match="known has no image tower"):
        encode(adapter.load(blind), batches(image=both["image"]))
    with pytest.raises(UserError, match="has 0 texts and 0 images"):
        encode(adapter.load(known), batches(id=["1"]))
    with pytest.raises(UserError, match="has 2 texts and 1 images"):
        encode(adapter.load(known), batches(text=["one", "two"], image=[picture(1), None]))
    with pytest.raises(UserError, match="precision='int8'"):
        encode(adapter.load(known), batches(**both), precision="int8")


def test_embeddings_that_rank_nothing_are_refused_and_two_alike_at_the_end_are_not():
    for broken in (lambda item: np.ones(8), lambda item: np.full(8, np.nan), lambda item: np.zeros(8)):
        for inputs in (batches(text=["one", "two"]), batches(image=[picture(1), picture(2)])):
            with pytest.raises(UserError, match="a ranking by them would say nothing"):
                encode(adapter.load(Known(broken)), inputs)
    blank = [Image.new("RGB", (5, side), "white") for side in (5, 6)]  # other bytes, one vector

    def vector(item):
        image = load_image(item)
        return random_vector(image.tobytes() if image.size == (12, 8) else "blank")

    found = encode(adapter.load(Known(vector)), batches(image=[*map(picture, range(BATCH)), *blank]))
    assert len(found) == BATCH + 2


def test_unknown_tasks_and_subsets_are_named_with_what_there_is():
    for word, message in {
        "STSBenchmrk": "mteb 2.* has no task or benchmark 'STSBenchmrk'; did you mean .*STSBenchmark",
        "ViDoRe(v11)": "did you mean .*ViDoRe.v1.",
        "STS17:en": "STS17 has no subset 'en'; it has .*en-en",
    }.items():
        with pytest.raises(UserError, match=message):
            asked_tasks([word])
    assert [task.hf_subsets for task in asked_tasks(["STS17:en-en", "XM3600T2IRetrieval:bn,de"])] == [
        ["en-en"],
        ["bn", "de"],
    ]
    subsets = {task.metadata.name: task.hf_subsets for task in asked_tasks(["MTEB(eng, v1)"])}
    assert subsets["STS17"] == ["en-en"]
    assert subsets["STS22"] == ["en"]


def test_a_task_of_images_is_refused_for_a_model_without_an_image_tower():
    blind = adapter.load(Known(signs, (16,), sees=False))
    check_modalities(blind, asked_tasks(["STSBenchmark", "SciFact"]))
    for name in ("Flickr30kT2IRetrieval", "VidoreArxivQARetrieval", "CIFAR10ZeroShot"):
        with pytest.raises(
            UserError, match=f"{name} is a task of image and text; known embeds text; it has no image tower"
        ):
            check_modalities(blind, asked_tasks(["STSBenchmark", name]))
    check_modalities(
        adapter.load(Known(signs, (16,))), asked_tasks(["Flickr30kT2IRetrieval", "VidoreArxivQARetrieval"])
    )
