"""Retrieval sets as training pairs and triplets: files of the beir library, MTEB's parquet, MS MARCO's TSV."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from beir.util import write_to_json, write_to_tsv
from data_prep.errors import UserError
from datasets import Dataset

CORPUS = {
    "d1": {"title": "Ice", "text": "Frozen  water. "},
    "d2": {"title": "", "text": "Fire\u2028burns"},
    "d3": {"title": "Only a title", "text": ""},
    **{f"n{number}": {"title": "", "text": f"no answer {number}"} for number in range(8)},
    "unjudged": {"title": "", "text": "nobody said anything of this"},
}
QUERIES = {"q1": "What is\tice?", "q2": "What burns?", "q3": "Of another split", "q4": "Answered by nothing"}
QRELS = {
    "q1": {"d1": 1, "d3": 2, **{f"n{number}": 0 for number in range(8)}},
    "q2": {"d2": 1, "gone": 1, "n0": 0},
    "q4": {"n1": 0},
    "nobody": {"d1": 1},
}


def beir_folder(place: Path) -> None:
    (place / "qrels").mkdir(parents=True)
    write_to_json(str(place / "corpus.jsonl"), CORPUS)
    write_to_json(str(place / "queries.jsonl"), QUERIES)
    write_to_tsv(str(place / "qrels" / "train.tsv"), QRELS)
    (place / "._corpus.jsonl").write_bytes(b"\0\5\x16\7")  # as macOS leaves them
    (place / "qrels" / "._train.tsv").write_bytes(b"\0\5\x16\7")
    write_to_tsv(str(place / "qrels" / "test.tsv"), {"q3": {"d2": 1}})


def mteb_folder(place: Path, prefix: str = "", number=str) -> None:
    """The layout that mteb's `push_dataset_to_hub` writes: a configuration for each part, a file for each split."""
    judged = [
        {"query-id": number(q), "corpus-id": number(d), "score": score}
        for q, documents in QRELS.items()
        for d, score in documents.items()
    ]
    parts = {
        f"{prefix}corpus/train": [{"id": number(name), **document} for name, document in CORPUS.items()],
        f"{prefix}queries/train": [{"id": number(name), "text": text} for name, text in QUERIES.items()],
        f"{prefix}qrels/train": judged,
        f"{prefix}qrels/test": [{"query-id": number("q3"), "corpus-id": number("d2"), "score": 1}],
    }
    configs: dict[str, list[dict[str, str]]] = {}
    for part, rows in parts.items():
        path = place / f"{part}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(path)
        name, split = part.split("/")
        configs.setdefault(name, []).append({"split": split, "path": f"{name}/{split}-*"})
    card = {"configs": [{"config_name": name, "data_files": files} for name, files in configs.items()]}
    (place / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")


def msmarco_folder(place: Path) -> None:
    place.mkdir()
    documents = {n: f"{d['title']} {d['text']}" if d["title"] and d["text"] else d["title"] or d["text"]
                 for n, d in CORPUS.items()}  # fmt: skip
    (place / "collection.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in documents.items()))
    raw = "".join(f"{name}\t{text}\n" for name, text in QUERIES.items()).encode()
    (place / "queries.train.tsv.gz").write_bytes(gzip.compress(raw))
    lines = [f"{q}\t0\t{d}\t{score}\n" for q, documents in QRELS.items() for d, score in documents.items()]
    (place / "qrels.train.tsv").write_text("".join(lines))


def texts(alternatives: list[dict]) -> list[str]:
    return [text["text"] for text in alternatives]


def check(found) -> None:
    (triplet,), (pair,) = found.samples["text-triplets"], found.samples["text-pairs"]
    assert texts(triplet.content["query"]) == ["What is\tice?"]
    assert texts(triplet.content["target"]) == ["Ice Frozen  water. ", "Only a title"]
    assert [texts(negative) for negative in triplet.content["negatives"]] == [[f"no answer {n}"] for n in range(7)]
    assert (texts(pair.content["query"]), texts(pair.content["target"])) == (["What burns?"], ["Fire\u2028burns"])
    assert found.dropped == {
        "no passage that is judged right": 1,
        "query with judgements that is not among the queries": 1,
    }
    assert found.receipt["notes"]["judgements of documents that are not in the corpus"] == 1
    assert pair.row.languages == ("en",)


@pytest.mark.parametrize("form", ["beir", "mteb", "msmarco"])
def test_judged_documents_become_pairs_and_triplets_word_for_word(run, tmp_path, form):
    place = tmp_path / "set"
    {"beir": beir_folder, "mteb": mteb_folder, "msmarco": msmarco_folder}[form](place)
    found = run("beir", data=place, language="en")
    check(found)
    joined = {"beir": "human:joined", "mteb": "human:joined", "msmarco": "human"}[form]
    assert [text["origin"] for text in found.samples["text-triplets"][0].content["target"]] == [joined, "human"]


def test_packed_lines_and_many_pieces_give_the_same(run, tmp_path, monkeypatch):
    import data_prep.sources.beir as module

    monkeypatch.setattr(module, "_QUERIES", 1)
    beir_folder(tmp_path / "set")
    for name in ("corpus", "queries"):
        path = tmp_path / "set" / f"{name}.jsonl"
        path.with_name(f"{name}.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    found = run("beir", data=tmp_path / "set", language="en")
    check(found)
    assert found.receipt["job"]["units"] == 4


def test_parts_of_a_language_are_taken_by_its_name(run, tmp_path):
    mteb_folder(tmp_path / "set", prefix="de-")
    with pytest.raises(UserError, match=r"no queries \(.jsonl, .parquet, .tsv.*it has de-corpus"):
        run("beir", data=tmp_path / "set")
    assert run("beir", data=tmp_path / "set", config="de").receipt["went_out"] == {"text-pairs": 1, "text-triplets": 1}


def test_another_split_is_not_taken_instead(run, tmp_path):
    beir_folder(tmp_path / "set")
    with pytest.raises(UserError, match="no judgements of the split 'dev'; --split may be test, train"):
        run("beir", data=tmp_path / "set", split="dev")
    found = run("beir", data=tmp_path / "set", split="test")
    assert texts(found.samples["text-pairs"][0].content["query"]) == ["Of another split"]


def test_grades_below_the_least_are_neither_positives_nor_negatives(run, tmp_path):
    beir_folder(tmp_path / "set")
    found = run("beir", data=tmp_path / "set", min_score=2)
    (triplet,) = found.samples["text-triplets"]
    assert texts(triplet.content["target"]) == ["Only a title"]
    assert "Frozen" not in json.dumps(triplet.content["negatives"])
    assert found.receipt["went_out"] == {"text-triplets": 1}


def test_ids_of_different_types_are_one_and_ids_that_meet_nowhere_an_error(run, tmp_path):
    numbers = {name: place for place, name in enumerate([*CORPUS, *QUERIES, "gone", "nobody"])}
    mteb_folder(tmp_path / "set", number=numbers.get)
    judged = Dataset.from_parquet(str(tmp_path / "set/qrels/train-00000-of-00001.parquet")).to_list()
    floats = [{**row, "query-id": float(row["query-id"]), "corpus-id": f"{row['corpus-id']}.0 "} for row in judged]
    Dataset.from_list(floats).to_parquet(tmp_path / "set/qrels/train-00000-of-00001.parquet")
    check(run("beir", data=tmp_path / "set", language="en"))
    other = [{**row, "corpus-id": f"doc{row['corpus-id']}"} for row in floats]
    Dataset.from_list(other).to_parquet(tmp_path / "set/qrels/train-00000-of-00001.parquet")
    with pytest.raises(UserError, match="no id of the judgements is among those of the corpus; they ask for 'doc"):
        run("beir", data=tmp_path / "set", out=tmp_path / "out2")


def test_rows_that_cannot_be_read_are_named_and_cost_themselves(run, tmp_path):
    place = tmp_path / "set"
    beir_folder(place)
    with (place / "corpus.jsonl").open("ab") as file:
        file.write(b'{"_id": "x", "text": \n{"_id": "y"}\n["list"]\n')
    with (place / "queries.jsonl").open("ab") as file:
        file.write(b'{"_id": "q9", "text": "latin \xe9"}\n')
    with (place / "qrels" / "train.tsv").open("a") as file:
        file.write("q1\td1\tgood\nq1\td1\nq1\td2\tnan\n")
    found = run("beir", data=place, language="en")
    assert found.receipt["went_out"] == {"text-pairs": 1, "text-triplets": 1}
    assert (
        found.dropped.items()
        >= {
            "not JSON": 1,
            "document without an id or text": 1,
            "not a JSON object": 1,
            "not UTF-8": 1,
            "judgement without query-id, corpus-id and a number as score": 3,
        }.items()
    )
    bad = found.receipt["examples"]["judgement without query-id, corpus-id and a number as score"]
    assert bad == [f"train.tsv, line {number}" for number in (17, 18, 19)]


MINED = [f"n{number}" for number in range(8)]
SCORED = [9.5, 9.6, *range(7)]  # of d1 and the eight; n0 is liked more than the answer


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("hard.jsonl", json.dumps({"qid": "q1", "pos": ["d1"], "neg": {"a": ["d1", *MINED[1:5]], "b": MINED[5:]}})),
        ("hard.jsonl", json.dumps({"qid": "q1", "pos": [{"pid": "d1", "ce-score": 9.5}], "neg": {"bm25": [
            {"pid": pid, "ce-score": score} for pid, score in zip(MINED, SCORED[1:], strict=True)]}})),
        ("colbert.jsonl", json.dumps(["q1", *map(list, zip(["d1", *MINED], SCORED, strict=True))])),
        ("listed.jsonl", json.dumps({"query_id": "q1", "positive_id": "d1", "score": SCORED}
         | {f"negative_{n}": pid for n, pid in enumerate(MINED, 1)})),
        ("triples.tsv", "".join(f"q1\td1\t{pid}\n" for pid in [*MINED[1:], "d1"])),
        ("scored.tsv", "".join(f"9.5\t{s}\tq1\td1\t{pid}\n" for pid, s in zip(MINED, SCORED[1:], strict=True))),
    ],
)  # fmt: skip
def test_triples_of_ids_become_triplets_of_texts_without_what_a_teacher_likes(run, tmp_path, name, content):
    beir_folder(tmp_path / "set")
    (tmp_path / name).write_text(content)
    found = run("beir", data=tmp_path / "set", triples=tmp_path / name, language="en")
    (triplet,) = found.samples["text-triplets"]
    assert texts(triplet.content["target"]) == ["Ice Frozen  water. "]
    negatives = [text for negative in triplet.content["negatives"] for text in texts(negative)]
    assert sorted(negatives) == [f"no answer {number}" for number in range(1, 8)]
    # Each score goes with its text, whatever their order.
    scores = triplet.content.get("scores")
    assert (scores is None) == (name in ("triples.tsv", "hard.jsonl") and "ce-score" not in content)
    if scores:
        assert scores[0] == 9.5
        assert [f"no answer {score + 1:g}" for score in scores[1:]] == negatives


def test_triples_in_parquet_and_those_that_cannot_be_read(run, tmp_path):
    beir_folder(tmp_path / "set")
    rows = [{"query_id": "q1", "positive_id": "d1", "negative_id": pid, "score": 1.0} for pid in MINED]
    rows += [{"query_id": "q2", "positive_id": None, "negative_id": "n1", "score": 1.0}]
    rows += [{"query_id": "q2", "positive_id": "d2", "negative_id": "n1", "score": -1.0}]
    Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    found = run("beir", data=tmp_path / "set", triples=tmp_path / "t.parquet")
    assert found.receipt["went_out"] == {"text-pairs": 1, "text-triplets": 1}
    assert sum(found.dropped.values()) == 1
    assert found.receipt["notes"]["negatives left out: scored nearly as high as the positive"] == 1
    (tmp_path / "t.csv").write_text("q1,d1,n1")
    with pytest.raises(UserError, match="expected .jsonl, .parquet or .tsv"):
        run("beir", data=tmp_path / "set", triples=tmp_path / "t.csv", out=tmp_path / "out2")


def test_a_set_on_a_hub_is_read_part_by_part(hub, say_to_hub, read_back, tmp_path):
    mteb_folder(hub)
    done = say_to_hub("beir", "someone/something", "--language", "en", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (pair,) = read_back(tmp_path / "out" / "text-pairs" / "beir")
    assert texts(pair.content["target"]) == ["Fire\u2028burns"]
    other = say_to_hub("beir", "someone/something", "--config", "fr", "--out", str(tmp_path / "out2"))
    assert other.returncode == 2
    assert "has no configuration fr-queries" in other.stderr


def small(place: Path, corpus: list, queries: list, judgements: list) -> Path:
    (place / "qrels").mkdir(parents=True)
    (place / "corpus.jsonl").write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in corpus))
    (place / "queries.jsonl").write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in queries))
    rows = "".join(f"{query}\t{document}\t1\n" for query, document in judgements)
    (place / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return place


def test_an_id_of_two_texts_joins_neither(run, tmp_path):
    corpus = [("1", "one"), ("2", "two"), ("1.0", "another one"), (1, "a third"), ("2", "two")]
    queries = [("a", "asks one"), ("b", "asks two"), ("c", "asks two, too"), ("c", "and again")]
    found = run("beir", data=small(tmp_path / "set", corpus, queries, [("a", 1), ("b", 2), ("c", 2)]))
    assert [sample.content["query"][0]["text"] for sample in found.samples["text-pairs"]] == ["asks two"]
    assert found.dropped["document id of two different texts"] == 3
    assert found.dropped["query id of two different texts"] == 2


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("550E8400-E29B-41D4-A716-446655440000", "{550e8400-e29b-41d4-a716-446655440000}"),
        ("caf\u00e9", "cafe\u0301"),
        (1e3, "1000"),
        (2**63 + 5, str(2**63 + 5)),
        (" 7", "7.0"),
    ],
)
def test_ids_that_are_one_join(run, tmp_path, ours, theirs):
    found = run("beir", data=small(tmp_path / "set", [(ours, "d"), ("x", "e")], [("q", "asks")], [("q", theirs)]))
    assert len(found.samples["text-pairs"]) == 1


@pytest.mark.parametrize(
    ("ours", "theirs"), [("01", "1"), ("1e3", "1000"), (2**53 + 2, f"{2**53 + 2}.0"), ("A", "a"), ("", "x1")]
)
def test_ids_that_are_not_one_do_not_join(run, tmp_path, ours, theirs):
    place = small(tmp_path / "set", [(ours, "d"), ("x", "e")], [("q", "asks"), ("r", "r")], [("q", theirs), ("r", "x")])
    assert [each.content["query"][0]["text"] for each in run("beir", data=place).samples["text-pairs"]] == ["r"]
