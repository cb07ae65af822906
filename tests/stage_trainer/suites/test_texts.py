"""MTEB's retrieval and STS sets: against pytrec_eval and scipy, in the layouts that BEIR and the hub have."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import scipy.stats
from data_prep.cli import main as data_prep
from datasets import Dataset
from stage_trainer.errors import UserError
from stage_trainer.evaluation import text_sets
from stage_trainer.evaluation.sets import SETS, find_sets
from stage_trainer.evaluation.text_sets import NDCG_10, SPEARMAN, measure_pairs, measure_retrieval

from .conftest import Known, evalset, random_vector

DOCUMENTS = {f"d{n}": (f"title {n}" if n % 3 else "", f"text of {n}") for n in range(40)}
QUERIES = {f"q{n}": f"query {n}" for n in range(12)} | {"d5": "a query that is a document, too"}
QRELS = [(q, f"d{(7 * n + 3 * j) % 40}", j) for n, q in enumerate(QUERIES) for j in range(4)] + [("d5", "d5", 1)]


def beir_folder(root: Path, split: str = "test") -> Path:
    """As BEIR's zips are, and as mteb reads them."""
    (root / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": name, "title": title, "text": text}) for name, (title, text) in DOCUMENTS.items()]
    (root / "corpus.jsonl").write_text("\n".join(corpus) + "\n")
    queries = {**QUERIES, "of-train": "asked in training"}
    (root / "queries.jsonl").write_text("".join(json.dumps({"_id": n, "text": t}) + "\n" for n, t in queries.items()))
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{d}\t{s}" for q, d, s in QRELS)]
    (root / f"qrels/{split}.tsv").write_text("\n".join(lines) + "\n")
    return root


def mteb_repository(root: Path) -> Path:
    """As mteb's hub repositories are: parquet by `datasets`, with ids as text."""
    rows = {
        "corpus": [{"_id": name, "title": title, "text": text} for name, (title, text) in DOCUMENTS.items()],
        "queries": [{"_id": name, "text": text} for name, text in QUERIES.items()],
    }
    for name, of in rows.items():
        Dataset.from_list(of).to_parquet(root / f"{name}/{name}-00000-of-00001.parquet")
    judged = [dict(zip(("query-id", "corpus-id", "score"), row, strict=True)) for row in QRELS]
    Dataset.from_list(judged).to_parquet(root / "data/test-00000-of-00001.parquet")
    return root


def trec(dim: int, *, without_own: bool) -> float:
    def units(texts: list[str]) -> np.ndarray:
        rows = np.stack([random_vector(text) for text in texts]).astype("f")[:, :dim]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    documents = units([f"{title} {text}".strip() for title, text in DOCUMENTS.values()])
    run, judged = {}, {}
    for name, vector in zip(QUERIES, units(list(QUERIES.values())), strict=True):
        scores = zip(DOCUMENTS, documents @ vector, strict=True)
        run[name] = {d: float(s) for d, s in scores if not (without_own and d == name)}
    for query, document, grade in QRELS:
        judged.setdefault(query, {})[document] = grade
    found = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut_10"}).evaluate(run)
    return float(np.mean([of["ndcg_cut_10"] for of in found.values()]))


@pytest.mark.parametrize("layout", [beir_folder, mteb_repository])
@pytest.mark.parametrize(("name", "without_own"), [("SciFact", False), ("ArguAna", True)])
def test_retrieval_is_trec_evals_ndcg_at_every_dim(tmp_path, layout, name, without_own, monkeypatch):
    monkeypatch.setattr(text_sets, "DOCUMENTS", 7)  # the corpus comes in parts, the last one smaller
    evalset("beir", layout(tmp_path / "source"), "--name", name, "--out", tmp_path / "eval")
    sets = find_sets(tmp_path / "eval")
    found = measure_retrieval(Known(random_vector), SETS[name], sets[name], print)
    for dim in (8, 4):
        assert found.figures[NDCG_10][name][str(dim)] == pytest.approx(trec(dim, without_own=without_own), abs=1e-12)
    assert found.counts == {"queries": 13, "documents": 40}
    assert not found.whole


def test_a_folder_of_beir_is_read_as_it_is_also_a_set_of_many(tmp_path):
    beir_folder(tmp_path / "data/scifact")
    beir_folder(tmp_path / "data/cqadupstack/android")
    beir_folder(tmp_path / "data/msmarco", split="dev")
    sets = find_sets(tmp_path / "data")
    assert set(sets) == {"SciFact", "CQADupstackAndroidRetrieval", "MSMARCO"}
    for name, folder in sets.items():
        found = measure_retrieval(Known(random_vector), SETS[name], folder, print)
        assert found.figures[NDCG_10][name]["8"] == pytest.approx(trec(8, without_own=name == "MSMARCO"), abs=1e-12)


def test_a_query_without_a_relevant_document_counts_as_zero_and_is_named(tmp_path):
    folder = beir_folder(tmp_path / "scifact")
    lines = ["query-id\tcorpus-id\tscore", "q0\td1\t1", "q1\td2\t0", "gone\td2\t1", "q0\tgone\t1"]
    (folder / "qrels/test.tsv").write_text("\n".join(lines) + "\n")
    vectors = {"query 0": 0, "title 1 text of 1": 0}
    model = Known(lambda text: np.eye(8)[vectors.get(text, 1 + len(text) % 5)])
    found = measure_retrieval(model, SETS["SciFact"], folder, print)
    first = 1 / (1 + 1 / np.log2(3))  # of two relevant documents the corpus has one, which is found first
    assert found.figures[NDCG_10]["SciFact"]["8"] == pytest.approx((first + 0) / 2, abs=1e-12)
    assert [note for note in found.notes if "SciFact:" in note] == [
        "SciFact: 1 queries with judgements are not among the queries",
        "SciFact: 1 judgements are of documents that the corpus does not have",
        "SciFact: 1 queries have no relevant document ('q1'); each counts as 0",
    ]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("corpus.jsonl", '{"_id": "d1", "text": 7}\n', "text of 'd1' is 7; expected a text"),
        ("corpus.jsonl", '{"text": "x"}\n', "line 1: its _id is None"),
        ("corpus.jsonl", '{"_id": 1, "text": "x"}\n{"_id": "1", "text": "y"}\n', "has 1 ids twice"),
        ("queries.jsonl", "no json\n", "is no JSON lines"),
        ("queries.jsonl", '{"_id": "other", "text": "x"}\n', "none of its ids is among those of .*queries"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td1\tgood\n", "expected query, document, grade"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td1\tnan\n", "expected query, document, grade"),
        ("qrels/test.tsv", "q0\td1\n", "expected query, document, grade"),
    ],
)
def test_a_set_of_another_form_is_refused(tmp_path, file, content, said):
    folder = beir_folder(tmp_path / "scifact")
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=said):
        measure_retrieval(Known(random_vector), SETS["SciFact"], folder, print)


def test_judgements_of_another_split_are_not_taken(tmp_path):
    folder = beir_folder(tmp_path / "scifact", split="train")
    with pytest.raises(UserError, match="test.tsv is missing; there are judgements in train.tsv"):
        measure_retrieval(Known(random_vector), SETS["SciFact"], folder, print)


def test_a_changed_file_of_a_set_is_noticed(tmp_path):
    evalset("beir", beir_folder(tmp_path / "source"), "--name", "NFCorpus", "--out", tmp_path / "eval")
    folder = find_sets(tmp_path / "eval")["NFCorpus"]
    described = json.loads((folder / "set.json").read_text())
    assert described["counts"] == {"queries": 13, "documents": 40, "judgements": 53}
    (folder / "corpus.jsonl").write_text((folder / "corpus.jsonl").read_text().replace("text of 7", "text of 8"))
    with pytest.raises(UserError, match="corpus.jsonl is not what set.json says"):
        measure_retrieval(Known(random_vector), SETS["NFCorpus"], folder, print)


PAIRS = [(f"left {n % 9}", f"right {n % 7}" if n % 4 else f"left {n % 9}", float(n % 6)) for n in range(40)]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
def test_similarity_is_scipys_spearman_of_all_pairs_also_equal_ones(tmp_path, form):
    rows = [dict(zip(("sentence1", "sentence2", "score"), pair, strict=True)) for pair in PAIRS]
    (tmp_path / "source").mkdir()
    path = tmp_path / f"source/test.{form}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if form == "parquet":
        Dataset.from_list(rows).to_parquet(tmp_path / "source/data/test-00000-of-00001.parquet")
    else:
        path.write_bytes(gzip.compress(lines) if form.endswith("gz") else lines)
    evalset("sts", tmp_path / "source", "--name", "STS12", "--out", tmp_path / "eval")
    found = measure_pairs(Known(random_vector), SETS["STS12"], find_sets(tmp_path / "eval")["STS12"])
    for dim in (8, 4):
        a, b = ([random_vector(pair[side]).astype("f")[:dim] for pair in PAIRS] for side in (0, 1))
        cosines = [
            x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(np.float64(a), np.float64(b), strict=True)
        ]
        # Equal pairs are exactly alike; sums in another order differ in the last digit.
        expected = scipy.stats.spearmanr(np.round(cosines, 9), [score for *_, score in PAIRS]).statistic
        assert found.figures[SPEARMAN]["STS12"][str(dim)] == pytest.approx(expected, abs=1e-12)
    assert found.counts == {"pairs": 40}


def test_of_several_languages_the_papers_is_taken(tmp_path):
    rows = [
        {"sentence1": f"a {n}", "sentence2": f"b {n}", "score": float(n % 5), "lang": "en-en" if n < 9 else "de-en"}
        for n in range(20)
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evalset("sts", path, "--name", "STS17", "--subset", "en-en", "--out", tmp_path / "eval")
    mixed = tmp_path / "mixed/STS17"
    mixed.mkdir(parents=True)
    (mixed / "test.jsonl").write_text(path.read_text())
    for folder in (find_sets(tmp_path / "eval")["STS17"], find_sets(tmp_path / "mixed")["STS17"]):
        assert measure_pairs(Known(random_vector), SETS["STS17"], folder).counts == {"pairs": 9}


def test_evalset_refuses_what_would_not_be_the_whole_set(tmp_path, capsys):
    source = beir_folder(tmp_path / "source")
    with (source / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d1", "text": "again"}\n')
    assert data_prep(["evalset", "beir", str(source), "--name", "SciFact", "--out", str(tmp_path / "eval")]) == 2
    assert "two rows of corpus have the id 'd1'" in capsys.readouterr().err
    assert not (tmp_path / "eval/test/text/SciFact").exists()
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b", "score": "high"}\n')
    assert data_prep(["evalset", "sts", str(path), "--name", "STS12", "--out", str(tmp_path / "eval")]) == 2
    assert "expected sentence1, sentence2 and a number as score" in capsys.readouterr().err
