"""`stage-trainer evaluate MODEL DATA --suite …`, as a user runs it."""

import csv
import json
import shutil

import numpy as np
import pytest
from stage_trainer.cli import main
from stage_trainer.evaluation import cross_modal
from stage_trainer.evaluation.suite import measure

from .conftest import Known, evalset, random_vector
from .test_texts import beir_folder


def test_the_tables_of_a_suite_come_from_one_pass_and_are_kept(export, photos, tmp_path, capsys):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    command = [
        "evaluate",
        str(export),
        str(photos),
        "--suite",
        "cross-modal",
        "--out",
        str(out),
        "--json",
        str(figures),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for number in ("2", "7", "8", "9", "12", "13", "14"):
        assert f"Table {number}: " in shown
        assert f"Table {number}: " in (out / "tables.txt").read_text()
    assert "max_length 512, instruction of queries none, resolution 16×16, computes in float32" in shown
    found = json.loads(figures.read_text())
    assert json.loads((out / "figures.json").read_text()) == found
    of = found["models"][str(export)]
    assert of["dims"] == [16, 8]
    ours = of["sets"]["Crossmodal-3600"]["figures"][cross_modal.TEXT_TO_IMAGE]
    rows = list(csv.DictReader((out / "table-8.csv").open()))
    assert rows[0]["row"] == "average"
    assert float(rows[0][str(export)]) == pytest.approx(100 * np.mean([dims["16"] for dims in ours.values()]), abs=1e-4)
    assert [row["paper: jina-clip-v2"] for row in rows[:2]] == ["81.4300", "73.5600"]
    by_dim = list(csv.DictReader((out / "table-13.csv").open()))
    assert float(by_dim[1][f"{export}, 8"]) == pytest.approx(100 * ours["ar"]["8"], abs=1e-4)
    assert main([*command[:3], "--table", "8", "--out", str(out)]) == 0
    again = capsys.readouterr()
    assert "Crossmodal-3600: measured before" in again.err
    assert "Table 9" not in again.out


def test_an_interrupted_evaluation_goes_on_set_by_set(photos, tmp_path):
    from stage_trainer.errors import UserError
    from stage_trainer.evaluation.sets import find_sets

    sets, said = find_sets(photos), []
    names = ["Flickr30K", "MS COCO"]

    def stops(item):
        if item == "COCO 3, 2":
            raise KeyboardInterrupt
        return random_vector(item)

    with pytest.raises(KeyboardInterrupt):
        measure(Known(stops), names, sets, tmp_path, said.append)
    model = Known(random_vector)
    column = measure(model, names, sets, tmp_path, said.append)
    assert model.calls == 2  # the images and the texts of COCO
    assert said[-2].startswith("Flickr30K: measured before")
    assert set(column.sets) == set(names)
    other = Known(lambda item: -random_vector(str(item)), fingerprint="1" * 64)  # another checkpoint of the same name
    assert measure(other, names, sets, tmp_path, said.append).sets != column.sets
    assert said[-2:] == [f"{name}: measured anew, since the model's weights changed …" for name in names]
    settings = Known(random_vector, fingerprint="1" * 64)
    settings.settings = {"max_length": "77"}
    measure(settings, names[:1], sets, tmp_path, said.append)
    assert said[-1] == "Flickr30K: measured anew, since the settings changed …"
    (file,) = tmp_path.glob("*/flickr30k.json")
    file.write_text(file.read_text()[:100])
    with pytest.raises(UserError, match="not finite"):
        measure(Known(lambda item: np.full(8, np.nan)), names[:1], sets, tmp_path, said.append)
    assert "cannot be read" in said[-1]


def test_what_is_missing_is_a_named_gap(export, photos, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(photos / "test/image-short/flickr30k", data / "flickr30k")
    assert main(["evaluate", str(export), str(data), "--suite", "all", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "– MS COCO (small): not among the data; `data-prep evalset coco` makes it" in shown
    row = next(line for line in shown.splitlines() if line.startswith("small"))  # of table 2
    assert row.split()[1:] == ["–"] * 6
    assert "not measured, for want of data: 3, 4, 8, 9, 10, 11, 13, 14, 15, vidore-v1-last-page" in shown


def test_a_model_without_an_image_tower_is_not_asked_for_images(photos, tmp_path):
    from stage_trainer.evaluation.sets import find_sets

    evalset("beir", beir_folder(tmp_path / "source"), "--name", "SciFact", "--out", tmp_path / "eval")
    found = {**find_sets(photos), **find_sets(tmp_path / "eval")}
    column = measure(Known(random_vector, sees=False), ["Flickr30K", "SciFact"], found, tmp_path / "out", print)
    assert set(column.sets) == {"SciFact"}
    assert column.gaps == {"Flickr30K": "known has no image tower"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--table", "6"], "--table 6: there is no such table of figures; there are 2, 3, 4"),
        (["--suite", "text"], "has none of the sets measured here (ArguAna, ClimateFEVER"),
        (["--suite", "cross-modal", "--by-language"], "--by-language is of pools"),
        (["--suite", "cross-modal", "--max-length", "0"], "--max-length is 0; expected a whole number from 2"),
        (["--beside", "other"], "add --suite or --table"),
        (["--table", "8", "--query-task", "separation"], "knows no task 'separation'; it knows query"),
    ],
)
def test_what_cannot_be_meant_is_refused(export, photos, tmp_path, capsys, words, said):
    assert main(["evaluate", str(export), str(photos), "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err


def test_two_folders_of_one_set_are_refused(export, photos, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(photos / "test/image-short/flickr30k", tmp_path / f"data/{name}/flickr30k")
    assert main(["evaluate", str(export), str(tmp_path / "data"), "--table", "7", "--out", str(tmp_path / "out")]) == 2
    assert "has Flickr30K twice" in capsys.readouterr().err


def test_a_model_twice_is_refused(export, photos, tmp_path, capsys):
    words = ["--table", "7", "--beside", str(export), "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(export), str(photos), *words]) == 2
    assert "is named twice" in capsys.readouterr().err


def test_pages_and_texts_by_the_command(export, pages, tmp_path, capsys):
    """With the instruction for queries, which texts of pairs and documents do not get."""
    queries = [{"query-id": n, "query": f"query {n % 3}"} for n in range(4)]
    data = pages("ArxivQ", queries, [(n, n, 1) for n in range(4)])
    evalset("beir", beir_folder(tmp_path / "source"), "--name", "SciFact", "--out", data)
    pairs = [{"sentence1": f"text {n}", "sentence2": f"title {n % 4}", "score": n % 5} for n in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    evalset("sts", tmp_path / "pairs.jsonl", "--name", "BIOSSES", "--out", data)
    words = ["--suite", "all", "--out", str(tmp_path / "out"), "--query-task", "query"]
    assert main(["evaluate", str(export), str(data), *words]) == 0
    shown = capsys.readouterr().out
    for table in ("Table 10: ", "Table 11: ", "Table 15: ", "vidore-v1-last-page: "):
        assert table in shown
    assert "instruction of queries 'text '" in shown
    sets = json.loads((tmp_path / "out/figures.json").read_text())["models"][str(export)]["sets"]
    assert set(sets) == {"ArxivQ", "SciFact", "BIOSSES"}
    assert sets["ArxivQ"]["counts"] == {"pages": 8, "queries": 3}
    plain = [*words[:2], "--out", str(tmp_path / "plain")]
    assert main(["evaluate", str(export), str(data), *plain]) == 0
    without = json.loads((tmp_path / "plain/figures.json").read_text())["models"][str(export)]["sets"]
    assert without["BIOSSES"]["figures"] == sets["BIOSSES"]["figures"]
    assert without["SciFact"]["figures"] != sets["SciFact"]["figures"]
