"""The list of everything that was dropped: whole, the same on any engine and after a stop, and named on the screen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_prep.cli import main
from data_prep.execute import Execution, Job, Output, Spec, Target, process_shard, run_job
from data_prep.execute.dropped import DroppedList, excerpt
from data_prep.execute.unit import read_receipt

DEEP = {"text": "Grüße\n\x1b[2J", "image": {"bytes": b"\x89PNG"}, "more": [1, "\u202e左"]}


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def work(piece: dict, options: dict, output: Output) -> None:
    for number in range(piece["rows"]):
        output.came_in()
        if number % 3:
            output.drop("odd", f"{piece['file']}, row {number}", content={"text": f"text {number}"})
        elif options.get("keep", True):
            output.write("text-pairs", {"json": b"{}"}, languages=["en"])
    if options.get("stop") == piece["file"]:
        raise KeyboardInterrupt


def job(tmp_path: Path, name: str, rows: int = 40, **options: object) -> Job:
    pieces = [{"file": f"{letter}.csv", "rows": rows} for letter in "abcdef"]
    return Job("test", Target(str(tmp_path / "out"), name, 10), f"{__name__}:work", pieces, options)


def test_every_dropped_row_is_listed_with_its_file_place_and_reason_and_the_screen_names_the_list(tmp_path, capsys):
    assert run_job(job(tmp_path, "n"), Execution(workers=1))["dropped"] == {"odd": 156}
    path = tmp_path / "out/text-pairs/n/dropped.jsonl"
    found = lines(path)
    assert [line["where"] for line in found] == [f"{c}.csv, row {n}" for c in "abcdef" for n in range(40) if n % 3]
    assert found[0] == {"source": "a.csv", "where": "a.csv, row 1", "reason": "odd", "excerpt": "text 1"}
    assert f"each that was dropped: {path}" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["stopped", "tasks"])
def test_the_list_is_the_same_however_a_job_is_run(tmp_path, engine):
    run_job(job(tmp_path, "plain"), Execution(workers=1), log=lambda _: None)
    if engine == "stopped":
        with pytest.raises(KeyboardInterrupt):
            run_job(job(tmp_path, "other", stop="c.csv"), Execution(workers=1), log=lambda _: None)
        assert not list((tmp_path / "out").rglob("*.tmp"))
        (tmp_path / "out/other.partial/job.json").write_text(json.dumps(job(tmp_path, "other").identity()))
        run_job(job(tmp_path, "other"), Execution(workers=1), log=lambda _: None)
    else:
        for task in (3, 1, 0, 2):
            run_job(job(tmp_path, "other"), Execution(workers=1, task=(task, 4)), log=lambda _: None)
    plain, other = (tmp_path / f"out/text-pairs/{name}/dropped.jsonl" for name in ("plain", "other"))
    assert plain.read_bytes() == other.read_bytes()


def test_where_nothing_goes_out_the_list_stays_and_the_error_names_it(tmp_path):
    words = [
        "import",
        "texts",
        str(tmp_path / "t.csv"),
        "--workers",
        "1",
        "--name",
        "n",
        "--out",
        str(tmp_path / "out"),
    ]
    (tmp_path / "t.csv").write_text("query,target\n" + "a,\n" * 7)
    assert main(words) == 2
    place = tmp_path / "out/n.dropped.jsonl"
    assert [line["where"] for line in lines(place)] == [f"t.csv, line {number}" for number in range(2, 9)]
    (tmp_path / "t.csv").write_text("query,target\na,b\n")
    assert main(words) == 0
    assert not place.exists()


def test_the_error_of_a_job_without_samples_names_the_list(tmp_path, capsys):
    with pytest.raises(ValueError, match="each that was dropped: .*n.dropped.jsonl"):
        run_job(job(tmp_path, "n", keep=False), Execution(workers=1), log=lambda _: None)


def test_a_unit_whose_list_is_cut_short_is_done_again(tmp_path):
    spec = Spec(f"{__name__}:work", str(tmp_path), 0, {"file": "a.csv", "rows": 10})
    process_shard(spec)
    whole = spec.dropped_path.read_bytes()
    spec.dropped_path.write_bytes(whole[:-5])
    assert read_receipt(spec) is None
    process_shard(spec)
    assert spec.dropped_path.read_bytes() == whole


def test_an_excerpt_is_one_short_line_without_images_addresses_or_signs_that_steer_a_terminal():
    assert excerpt(DEEP) == "Grüße \ufffd[2J | \ufffd左"
    assert excerpt({"url": "https://me:secret@host/x?key=1", "n": 3}) == "https://…"
    assert excerpt(b"caf\xe9") == "caf\ufffd"
    assert len(excerpt(["x" * 10**6] * 5)) == 121
    assert excerpt(None) == ""


def test_a_list_holds_names_and_texts_that_are_not_utf_8(tmp_path):
    one = DroppedList(tmp_path / "l.jsonl", "caf\udce9.csv")
    one.add("odd", "caf\udce9.csv, line 3", content="half \ud800")
    assert one.finish() == (tmp_path / "l.jsonl").stat().st_size
    assert lines(tmp_path / "l.jsonl")[0]["source"] == "caf\udce9.csv"


def test_an_import_lists_what_readers_rows_and_images_lose(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.csv").write_bytes(b'query,target\n"open,b\n' + b"caf\xe9,b\na,b,c\n , \ngood,fine\n")
    (tmp_path / "in/b.jsonl").write_bytes(b'{"query": "a"}\n{oh\n["x", "y"]\n')
    words = ["--quoting", "double", "--encoding", "utf-8", "--workers", "1", "--name", "n", "--out", str(tmp_path)]
    assert main(["import", "texts", str(tmp_path / "in"), *words]) == 0
    found = lines(tmp_path / "text-pairs/n/dropped.jsonl")
    assert [(Path(str(line["source"])).name, line.get("excerpt")) for line in found] == [
        ("a.csv", '"open,b'),
        ("a.csv", "caf\ufffd,b"),
        ("a.csv", "a | b | c"),
        ("a.csv", "|"),
        ("b.jsonl", "a"),
        ("b.jsonl", "{oh"),
    ]
