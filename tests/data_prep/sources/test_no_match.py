"""Rows that are labelled as no match: hard negatives of the matches of their query, or dropped by name."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from data_prep.cli import main
from pyarrow import Table, parquet

ALONE = "no match, of a query without a match in any row"
FEW = "no match, fewer than --negatives {} of its query"
MORE = "no match, beyond the first {} of its query"
BOTH = "no match, but also a match of its query, or there twice"

# The rows of a query stand apart, before and after its match.
ROWS = [
    ("How?", "no 1", 0),
    ("When?", "at noon", 1),
    ("How?", "so", 1),
    ("Who?", "nobody", 0),
    ("When?", "never", 0),
    ("How?", "no 2", 0),
    ("How?", "So ", 0),
    ("How?", "no 1", 0),
    ("How?", "like this", 1),
    ("How?", "no 3", 0),
]


def write(path: Path, rows: list[tuple[str, str, object]], names: tuple[str, str, str]) -> Path:
    objects = [dict(zip(names, row, strict=True)) for row in rows]
    if path.suffix == ".parquet":
        parquet.write_table(Table.from_pylist(objects), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    else:
        path.write_text(",".join(names) + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def triplets(found) -> list[tuple[str, list[str], list[str]]]:
    contents = [sample.content for sample in found.samples.get("text-triplets", ())]
    return [
        (one["query"][0]["text"], [t["text"] for t in one["target"]], [t["text"] for (t,) in one["negatives"]])
        for one in contents
    ]


@pytest.mark.parametrize(
    ("reader", "name"),
    [("texts", "t.csv"), ("texts", "t.jsonl"), ("texts", "t.parquet"), ("hf", "t.jsonl"), ("hf", "t.parquet")],
)
def test_a_query_with_a_match_and_enough_others_is_a_triplet_and_every_other_row_has_its_reason(
    run, tmp_path, reader, name
):
    path = write(tmp_path / name, ROWS, ("sentence1", "sentence2", "label"))
    source = {"files": [path]} if reader == "texts" else {"data": path}
    found = run(reader, negatives=2, **source)
    assert triplets(found) == [("How?", ["so", "like this"], ["no 1", "no 2"])]
    pairs = [(one.content["query"][0]["text"], one.content["target"][0]["text"]) for one in found.samples["text-pairs"]]
    assert pairs == [("When?", "at noon"), ("How?", "so"), ("How?", "like this")]
    assert found.dropped == {ALONE: 1, FEW.format(2): 1, MORE.format(2): 1, BOTH: 2}
    assert found.receipt["came_in"] == len(ROWS)


def test_matches_and_others_of_a_query_may_stand_in_different_files(run, tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/b.csv", [("q", "n", 0)], ("sentence1", "sentence2", "label"))
    write(tmp_path / "in/a.jsonl", [("q", "t", True), ("other", "n", False)], ("question", "answer", "is_match"))
    found = run("texts", files=[tmp_path / "in"], negatives=1)
    assert triplets(found) == [("q", ["t"], ["n"])]
    lines = (tmp_path / "out/text-triplets/texts/dropped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "source": str(tmp_path / "in/a.jsonl"),
            "where": "a.jsonl, line 2",
            "reason": ALONE,
            "excerpt": "other | n",
        }
    ]


def test_with_fewer_than_seven_the_matches_are_pairs_and_no_row_is_lost_without_a_word(run, tmp_path):
    path = write(tmp_path / "t.csv", ROWS, ("sentence1", "sentence2", "label"))
    found = run("texts", files=[path])
    assert found.receipt["went_out"] == {"text-pairs": 3}
    assert found.dropped == {ALONE: 1, FEW.format(7): 4, BOTH: 2}


def test_which_labels_say_no_can_be_chosen_and_none_makes_negatives_of_none(run, tmp_path):
    rows = [("p", "h0", 0), ("p", "h1", 1), ("p", "h2", 2)]
    path = write(tmp_path / "nli.jsonl", rows, ("premise", "hypothesis", "label"))
    neutral = run("texts", files=[path], positives="0", negatives=1, out=tmp_path / "a")
    assert "text-triplets" not in neutral.samples  # neither 1 nor 2 is known to contradict
    assert neutral.dropped == {"labelled as no match": 2}
    found = run("texts", files=[path], positives="0", no_match="2", negatives=1, out=tmp_path / "b")
    assert triplets(found) == [("p", ["h0"], ["h2"])]
    assert found.dropped == {"labelled as no match": 1}
    words = write(tmp_path / "w.jsonl", [("q", "t", "yes"), ("q", "n", "no"), ("q", "m", "neutral")], ("a", "b", "l"))
    columns = {"query_column": "a", "target_column": "b", "label_column": "l", "negatives": 1}
    assert triplets(run("texts", files=[words], out=tmp_path / "c", **columns)) == [("q", ["t"], ["n"])]
    dropped = run("texts", files=[words], out=tmp_path / "d", no_match="none", **columns)
    assert (dropped.samples.keys(), dropped.dropped) == ({"text-pairs"}, {"labelled as no match": 2})


def test_scores_make_no_negatives(run, tmp_path):
    rows = [("q", "t", 0.9), ("q", "n", 0.0), ("q", "m", 0.4)]
    found = run("texts", files=[write(tmp_path / "t.csv", rows, ("text1", "text2", "score"))], negatives=1)
    assert (found.receipt["went_out"], found.dropped) == ({"text-pairs": 1}, {"score below --min-score": 2})


def test_class_names_of_the_library_and_languages_of_rows_count(run, tmp_path):
    import datasets

    labels = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": labels,
            "language": datasets.Value("string"),
        }
    )
    rows = {
        "sentence1": ["Wann?"] * 2,
        "sentence2": ["nie", "um zwölf"],
        "label": [0, 1],
        "language": ["de-DE"] * 2,
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    found = run("hf", data=tmp_path / "saved", negatives=1)
    assert triplets(found) == [("Wann?", ["um zwölf"], ["nie"])]
    (sample,) = found.samples["text-triplets"]
    assert sample.row.languages == ("de",)


def test_tasks_of_an_array_give_the_same_bytes(tmp_path, capsys):
    write(tmp_path / "t.csv", ROWS * 3, ("sentence1", "sentence2", "label"))
    words = ["import", "texts", str(tmp_path / "t.csv"), "--negatives", "2", "--workers", "1", "--name", "n", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    for task in ("1/2", "0/2"):
        assert main([*words, str(tmp_path / "two"), "--task", task]) == 0
    for name in ("text-triplets/n/00001-0000.tar", "text-pairs/n/dropped.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_disk_that_does_not_take_the_rows_is_one_line_that_says_what_to_do(tmp_path, capsys, monkeypatch):
    def full(rows):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("data_prep.sources.no_match._stored", full)
    path = write(tmp_path / "t.csv", ROWS, ("sentence1", "sentence2", "label"))
    assert main(["import", "texts", str(path), "--workers", "1", "--name", "n", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "(database or disk is full)" in error
    assert "TMPDIR" in error
    assert error.count("\n") == 1


MEMORY = """
import sys
from data_prep.samples import Text
from data_prep.sources.no_match import hard_negatives
from data_prep.sources.records import NoMatch, TextRecord

def rows(count):
    for kind in (TextRecord, NoMatch):
        for number in range(count // 2):
            query, target = (f"{side} {number} {'x' * 60}" for side in ("query", kind.__name__))
            yield "t.csv", kind("line", [Text(query, "en", "body")], [Text(target, "en", "body")])

found = sum(1 for _ in hard_negatives(rows(int(sys.argv[1])), 1))
# Not ru_maxrss, which a process takes over from the one that started it.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(found, int(peak) // 1024)
"""


@pytest.mark.full
def test_memory_does_not_grow_with_the_rows_that_are_sorted():
    peaks = []
    for count in (200_000, 600_000):  # from some 150,000 on they are sorted on the disk
        done = subprocess.run([sys.executable, "-c", MEMORY, str(count)], capture_output=True, text=True, check=True)
        found, peak = map(int, done.stdout.split())
        assert found == count // 2
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 10
