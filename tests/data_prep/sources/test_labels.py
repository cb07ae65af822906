"""Labels and scores: a pair that is said not to match never becomes a positive, in whatever form it is said."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path

import pytest
from data_prep.errors import UserError
from pyarrow import Table, parquet

ALONE = "no match, of a query without a match in any row"


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return path


def pairs(marks: list[object], column: str = "label") -> list[dict]:
    return [{"sentence1": f"q{n}", "sentence2": f"t{n}", column: mark} for n, mark in enumerate(marks)]


def queries(found) -> list[str]:
    return [sample.content["query"][0]["text"] for sample in found.samples["text-pairs"]]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
@pytest.mark.parametrize(
    ("column", "marks", "kept", "reason"),
    [
        ("label", [1, 0, 1, 0], ["q0", "q2"], ALONE),
        ("is_duplicate", [True, False, False], ["q0"], ALONE),
        ("gold_label", ["entailment", "contradiction"], ["q0"], ALONE),
        ("gold_label", ["entailment", "neutral"], ["q0"], "labelled as no match"),
        ("gold_label", ["entailment", "-"], ["q0"], "without a label or score"),
        ("score", [0.98, 0.0, 0.79], ["q0"], "score below --min-score"),
        ("label", [0.98, 0.3], ["q0"], "score below --min-score"),
        ("Similarity", [1.0, 0.0], ["q0"], "score below --min-score"),
        ("isDuplicate", ["Y", "N"], ["q0"], ALONE),
        ("sentence_label", ["same", "not similar"], ["q0"], ALONE),
        ("is_similar", ["t", "f"], ["q0"], ALONE),
        ("cosine_similarity", [0.9, 0.2], ["q0"], "score below --min-score"),
        ("Relevance", [1, 0], ["q0"], "score below --min-score"),
        ("label", ["entailment", "whatever"], ["q0"], "label that is not known; say --positives"),
        ("gold", ["1", "0"], ["q0"], ALONE),
        ("gold_rating", [0.9, 0.2], ["q0"], "score below --min-score"),
    ],
)
def test_only_what_is_said_to_match_is_a_positive(run, tmp_path, name, column, marks, kept, reason):
    found = run("texts", files=[write(tmp_path / name, pairs(marks, column))])
    assert queries(found) == kept
    assert found.dropped == {reason: len(marks) - len(kept)}


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_number_off_the_scale_stops_the_import_and_says_what_to_say(run, tmp_path, name):
    path = write(tmp_path / name, pairs([4.8, 0.9, 2.0], "score"))
    with pytest.raises(UserError, match=r"score is 4.8; expected 0 to 1.*--score-scale 5"):
        run("texts", files=[path], out=tmp_path / "refused")
    assert not (tmp_path / "refused/text-pairs").exists()
    assert queries(run("texts", files=[path], score_scale=5.0)) == ["q0"]
    assert queries(run("texts", files=[path], score_scale=5.0, min_score=0.4, out=tmp_path / "more")) == ["q0", "q2"]
    classes = write(tmp_path / f"classes{path.suffix}", pairs([0, 1, 2]))
    with pytest.raises(UserError, match="--positives 0"):
        run("texts", files=[classes], out=tmp_path / "refused")
    assert queries(run("texts", files=[classes], positives="0", out=tmp_path / "classes")) == ["q0"]


def test_which_number_is_entailment_is_asked(run, tmp_path):
    rows = [{"premise": "p0", "hypothesis": "h", "label": 0}, {"premise": "p1", "hypothesis": "h", "label": 1}]
    path = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(UserError, match="which number is entailment differs"):
        run("texts", files=[path])
    assert queries(run("texts", files=[path], positives="0")) == ["p0"]


def test_graded_pairs_become_a_set_to_evaluate_on(run, tmp_path):
    path = write(tmp_path / "t.csv", [*pairs([5.0, 0.0, 2.4], "score"), {"sentence1": "q", "sentence2": "t"}])
    found = run("texts", files=[path], score_scale=5.0, graded="sts")
    assert [sample.content["score"] for sample in found.samples["text-pairs"]] == [5.0, 0.0, 2.4]
    assert found.dropped == {"pair without a score": 1}


def test_a_label_that_is_a_score_is_one_at_the_ends_of_the_scale_too(run, tmp_path):
    """GLUE calls the scores of STS-B, 0 to 5, label."""
    path = write(tmp_path / "t.csv", pairs([5.0, 0.0, 1.0, 4.4]))
    found = run("texts", files=[path], score_scale=5.0, out=tmp_path / "pairs")
    assert queries(found) == ["q0", "q3"]
    assert found.dropped == {"score below --min-score": 2}
    whole = run("texts", files=[path], score_scale=5.0, graded="sts", out=tmp_path / "sts")
    assert [sample.content["score"] for sample in whole.samples["text-pairs"]] == [5.0, 0.0, 1.0, 4.4]
    ones = write(tmp_path / "ones.csv", pairs([1.0, 0.0, 0.5]))
    found = run("texts", files=[ones], graded="sts", out=tmp_path / "ones")
    assert [sample.content["score"] for sample in found.samples["text-pairs"]] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
@pytest.mark.parametrize(
    ("column", "marks"),
    [
        ("Quality", [1, 0, 1]),
        ("y", [True, False]),
        ("target", ["0", "1", "0"]),
        ("class", ["entailment", "contradiction"]),
    ],
)
def test_a_column_of_another_name_that_may_be_a_label_is_asked_about(run, tmp_path, name, column, marks):
    path = write(tmp_path / name, pairs(marks, column))
    with pytest.raises(UserError, match=f"{column} is .*--label-column {column}, else --label-column none"):
        run("texts", files=[path], out=tmp_path / "asked")
    right = [f"q{n}" for n, mark in enumerate(marks) if mark in (1, "1", "entailment")]
    assert queries(run("texts", files=[path], label_column=column)) == right
    whole = run("texts", files=[path], label_column="none", out=tmp_path / "none")
    assert queries(whole) == [f"q{n}" for n in range(len(marks))]
    assert {sample.content["target"][0]["text"] for sample in whole.samples["text-pairs"]} == {
        f"t{n}" for n in range(len(marks))
    }


def test_numbers_of_rows_are_no_labels(run, tmp_path):
    path = write(tmp_path / "t.csv", pairs([0, 1], "Unnamed: 0"))
    assert queries(run("texts", files=[path])) == ["q0", "q1"]


def test_scores_of_something_else_and_columns_of_texts_are_no_labels(run, tmp_path):
    rows = [{"text": f"q{n}", "match": f"t{n}", "language_score": 0.4} for n in range(2)]
    found = run("texts", files=[write(tmp_path / "t.jsonl", rows)], query_column="text", target_column="match")
    assert queries(found) == ["q0", "q1"]


def test_a_column_that_says_nothing_of_the_pair_can_be_passed_over_and_another_be_named(run, tmp_path):
    path = write(tmp_path / "t.csv", [{**row, "gold": n} for n, row in enumerate(pairs([7, 8]))])
    assert queries(run("texts", files=[path], label_column="none")) == ["q0", "q1"]
    assert queries(run("texts", files=[path], label_column="gold", out=tmp_path / "gold")) == ["q1"]
    with pytest.raises(UserError, match="has no column other"):
        run("texts", files=[path], label_column="other", out=tmp_path / "other")
    for wrong in ({"min_score": 0.0}, {"min_score": 3.0}, {"score_scale": 0.0}):
        with pytest.raises(UserError, match="expected"):
            run("texts", files=[path], out=tmp_path / "wrong", **wrong)


def test_a_positive_says_itself_that_it_is_one(run, tmp_path):
    rows = [{"query": "q0", "positive": "p", "negative": "n", "score": 12.5}]
    assert queries(run("texts", files=[write(tmp_path / "t.jsonl", rows)])) == ["q0"]


def test_labels_may_be_decimals(run, tmp_path):
    path = write(tmp_path / "t.parquet", pairs([Decimal("1"), Decimal("0")]))
    assert queries(run("texts", files=[path])) == ["q0"]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
@pytest.mark.parametrize(
    ("column", "marks"),
    [
        ("distance", ["0.05", "0.9", "0.2"]),
        ("cosine_distance", [0.05, 0.9, 0.2]),
        ("edit_distance", [1, 12, 3]),
        ("dissimilarity", ["0.05", "0.9", "0.2"]),
        ("contradiction_score", [0.9, 0.1, 0.8]),
        ("is_not_duplicate", [1, 0, 1]),
        ("nonDuplicate", [True, False, True]),
        ("mismatch", [1, 0, 1]),
    ],
)
def test_what_says_how_different_texts_are_is_no_likeness(run, tmp_path, name, column, marks):
    path = write(tmp_path / name, pairs(marks, column))
    with pytest.raises(UserError, match=f"{column} is .* how different the texts are.*--label-column none"):
        run("texts", files=(str(path),))
    with pytest.raises(UserError, match="how different"):
        run("texts", files=(str(path),), label_column=column, graded="sts")
    assert queries(run("texts", files=(str(path),), label_column="none")) == ["q0", "q1", "q2"]


def test_a_label_that_is_turned_round_is_read_by_its_positives(run, tmp_path):
    path = write(tmp_path / "t.csv", pairs([1, 0, 1], "is_not_duplicate"))
    assert queries(run("texts", files=(str(path),), label_column="is_not_duplicate", positives="0")) == ["q1"]


@pytest.mark.parametrize(
    ("column", "marks"),
    [
        ("confidence", [0.9, 0.1, 0.8]),
        ("class", ["paraphrase", "not a paraphrase", "paraphrase"]),
        ("annotation", ["good", "bad", "good"]),
        ("is_valid", ["valid", "invalid", "valid"]),
        ("opinion", [1, -1, 1]),
    ],
)
def test_shares_and_opposites_under_any_name_are_asked_about(run, tmp_path, column, marks):
    path = write(tmp_path / "t.csv", pairs(marks, column))
    with pytest.raises(UserError, match=f"{column} is .*--label-column {column}, else --label-column none"):
        run("texts", files=(str(path),))
    assert len(queries(run("texts", files=(str(path),), label_column="none"))) == 3


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("language", ["no", "sv", "da"]),
        ("lid_score", [0.9, 0.2, 0.5]),
        ("split", ["train", "test", "train"]),
        ("id", [0, 1, 2]),
        ("note", ["Yes, it is.", "No, never.", "good"]),
        ("words", [3, 1, 7]),
    ],
)
def test_what_says_something_else_is_not_asked_about(run, tmp_path, column, values):
    path = write(tmp_path / "t.csv", pairs(values, column))
    assert len(queries(run("texts", files=(str(path),)))) == 3


def test_labels_in_lists_are_asked_about(run, tmp_path):
    path = tmp_path / "t.jsonl"
    for marks in (["1", "0", "1"], ["entailment", "contradiction", "entailment"], [0.2, 0.9, 0.2]):
        for place in (0, 2):
            rows = [[f"q{n}", f"t{n}"] for n in range(3)]
            for row, mark in zip(rows, marks, strict=True):
                row.insert(place, mark)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            with pytest.raises(UserError, match=f"element {place + 1} of the lists .* may be a label"):
                run("texts", files=(str(path),))
    path.write_text('["a", "b", "c"]\n["d", "e", "f"]\n')
    assert queries(run("texts", files=(str(path),))) == ["a", "d"]


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_labels_in_objects_are_asked_about(run, tmp_path, name):
    rows = [{"query": f"q{n}", "target": f"t{n}", "annotation": {"label": mark}} for n, mark in enumerate("101")]
    path = write(tmp_path / name, rows)
    with pytest.raises(UserError, match=r"--label-column annotation\.label"):
        run("texts", files=(str(path),))
    assert queries(run("texts", files=(str(path),), label_column="annotation.label")) == ["q0", "q2"]


@pytest.mark.parametrize("marks", [["95%", "10 %", "80%"], ["0,95", "0,1", "0,8"], ["1,0", "0,1", "0,85"]])
def test_shares_of_a_hundred_and_decimal_commas_are_scores(run, tmp_path, marks):
    path = write(tmp_path / "t.csv", pairs(marks, "similarity"))
    assert queries(run("texts", files=(str(path),))) == ["q0", "q2"]


def test_a_comma_that_may_be_a_thousands_mark_makes_no_score(run, tmp_path):
    found = run("texts", files=(str(write(tmp_path / "t.csv", pairs(["1,000", "1"], "similarity"))),))
    assert queries(found) == ["q1"]


@pytest.mark.parametrize(("label", "kept"), [("label", ["q0"]), ("is_duplicate", ["q0"]), ("score", ["q0", "q1"])])
def test_a_positive_column_does_not_overrule_a_label_that_says_no(run, tmp_path, label, kept):
    rows = [{"anchor": f"q{n}", "positive": f"t{n}", label: mark} for n, mark in enumerate((1, 0))]
    assert queries(run("texts", files=(str(write(tmp_path / "t.csv", rows)),))) == kept
    rows = [{**row, "negative": "n"} for row in rows]  # a label of a triplet is a margin
    path = write(tmp_path / "n.csv", rows)
    assert queries(run("texts", files=(str(path),), out=tmp_path / "more")) == ["q0", "q1"]


def test_texts_that_may_be_missing_values_are_counted_and_kept(run, tmp_path):
    found = run(
        "texts", files=(str(write(tmp_path / "t.csv", [{"query": "q", "target": t} for t in ("nan", "None", "b")])),)
    )
    assert found.receipt["notes"]["texts that may stand for a missing value (NULL, nan, None); they are kept"] == 2
    assert len(found.samples["text-pairs"]) == 3
