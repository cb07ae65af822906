"""`stage-trainer encode`: every kind of input, in order, with ids; resumed after a kill; bad inputs by name."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from data_prep.shards import DatasetWriter
from PIL import Image
from stage_trainer import hub
from stage_trainer.bulk import job
from stage_trainer.bulk.encoder import Encoder
from stage_trainer.cli import main
from stage_trainer.errors import UserError

TEXTS = [f"a red disk {number}" for number in range(100)]


@pytest.fixture(scope="module")
def model(reader, tmp_path_factory):
    """A saved model's folder."""
    folder = tmp_path_factory.mktemp("models") / "model"
    reader.save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """A folder of five images, by path."""
    draw = np.random.default_rng(0)
    found = [tmp_path / "photos" / name for name in ("a.png", "b/c.jpg", "b/d.PNG", "e.webp", "f.bmp")]
    for path in found:
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "notes.md").write_text("no image")
    return found


@pytest.fixture
def shards(tmp_path, png):
    """A data set of two images with three captions."""
    with DatasetWriter(tmp_path / "shards", kind="image-short", source="drawn") as writer:
        for key, captions in (("one", ["a red disk", "ein Kreis"]), ("two", ["a blue one"])):
            texts = [{"text": text, "language": "en"} for text in captions]
            content = json.dumps({"captions": texts}).encode()
            writer.write(key, {"png": png, "json": content}, languages=["en"], tokens=4)
    return tmp_path / "shards"


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of ten texts."""
    monkeypatch.setattr(job, "_TEXTS", 10)


def encoded(out):
    """(ids, vectors) of a file."""
    if out.suffix == ".npy":
        return [json.loads(line) for line in out.with_suffix(".ids.jsonl").open(encoding="utf-8")], np.load(out)
    table = parquet.read_table(out)
    assert table.schema.types[0] == pa.string()
    assert pa.types.is_fixed_size_list(table.schema.types[1])
    return table["id"].to_pylist(), np.stack(table["vector"].to_numpy())


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def close(found, expected):
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize("name", ["vectors.parquet", "vectors.npy"])
def test_every_kind_of_input_is_embedded_in_order_with_its_id(
    model, reader, photos, shards, png, tmp_path, capsys, name
):
    lines = tmp_path / "lines.txt"
    lines.write_bytes("\ufeffa red disk\r\nein Kreis\u2028\nand a blue one".encode())
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"n": 7, "t": "a disk"}\n\n{"t": "ein \\"roter\\"", "n": "eight"}\n')
    table = tmp_path / "table.csv"
    table.write_text('n,t\n1,"a red\ndisk, b"\n2,ein Kreis\n')
    given = [lines, tmp_path / "photos", rows, table, photos[1], shards]
    assert (
        main(["encode", str(model), *map(str, given), "--column", "t", "--id", "n", "--out", str(tmp_path / name)]) == 0
    )
    ids, vectors = encoded(tmp_path / name)
    assert ids == [
        *(f"{lines}:{n}" for n in (1, 2, 3)), *map(str, photos), "7", "eight", "1", "2", str(photos[1]), "one", "two"
    ]  # fmt: skip
    texts = ["a red disk", "ein Kreis\u2028", "and a blue one", "a disk", 'ein "roter"', "a red\ndisk, b", "ein Kreis"]
    of_texts, of_images = reader.encode_text(texts), reader.encode_image([*photos, photos[1], png, png])
    close(vectors, np.concatenate([of_texts[:3], of_images[:5], of_texts[3:], of_images[5:]]))
    assert f"wrote {tmp_path / name}: 15 vectors" in capsys.readouterr().out
    assert left_in(tmp_path) == []  # no parts, no lock


def test_cells_are_images_where_they_are_bytes_or_said_to_be(model, reader, photos, png, tmp_path):
    table, listed = tmp_path / "table.parquet", tmp_path / "photos" / "list.txt"
    of_datasets = [{"bytes": png, "path": None}, {"bytes": None, "path": "photos/a.png"}]
    parquet.write_table(pa.table({"image": of_datasets, "raw": [png, photos[3].read_bytes()]}), table)
    listed.write_text("a.png\nb/c.jpg\n")
    for column, files, expected in (
        ("raw", [table], [png, photos[3]]),
        ("image", [table, listed], [png, photos[0], photos[0], photos[1]]),
    ):
        out = tmp_path / f"{column}.npy"
        kind = [] if column == "raw" else ["--kind", "image"]
        assert main(["encode", str(model), *map(str, files), "--out", str(out), "--column", column, *kind]) == 0
        close(encoded(out)[1], reader.encode_image(expected))


def test_samples_give_their_texts_if_asked(model, reader, shards, tmp_path):
    out = tmp_path / "v.npy"
    assert main(["encode", str(model), str(shards), "--kind", "text", "--out", str(out)]) == 0
    ids, vectors = encoded(out)
    assert ids == ["one/captions/0", "one/captions/1", "two/captions/0"]
    close(vectors, reader.encode_text(["a red disk", "ein Kreis", "a blue one"]))


def test_options_are_those_of_encode(model, reader, tmp_path):
    lines, out = tmp_path / "lines.txt", tmp_path / "v.npy"
    lines.write_text("a disk\nein Kreis\n")
    options = [
        "--prompt-name",
        "query",
        "--truncate-dim",
        "8",
        "--no-normalize",
        "--max-length",
        "4",
        "--batch-size",
        "1",
    ]
    assert main(["encode", str(model), str(lines), *options, "--out", str(out)]) == 0
    expected = reader.encode_text(["a disk", "ein Kreis"], task="query", truncate_dim=8, normalize=False, max_length=4)
    close(encoded(out)[1], expected)


def test_bad_inputs_are_named_with_their_place_or_skipped_and_listed(
    model, reader, photos, tmp_path, capsys, small_parts
):
    photos[2].write_bytes(b"no image")
    listed, rows, table = tmp_path / "list.txt", tmp_path / "rows.jsonl", tmp_path / "table.parquet"
    listed.write_bytes(b"photos/a.png\nphotos/gone.png\n\n\xff\nphotos/e.webp\n")
    rows.write_text('{"t": "photos/a.png"}\n{"t": null}\n{"t": 3}\nnonsense\n[1]\n{"u": 1}\n{"t": "x\\ud800"}\n')
    parquet.write_table(pa.table({"t": [None, "photos/f.bmp"]}), table)
    given = [str(model), str(tmp_path / "photos"), str(listed), str(rows), str(table), "--column", "t"]
    given += ["--kind", "image", "--out", str(tmp_path / "v.parquet")]
    assert main(["encode", *given]) == 2
    said = capsys.readouterr().err
    assert f"inputs[2]: {photos[2]} cannot be decoded as an image" in said
    assert "--errors skip" in said
    assert not (tmp_path / "v.parquet").exists()
    assert main(["encode", *given, "--errors", "skip"]) == 0
    ids, vectors = encoded(tmp_path / "v.parquet")
    kept = [photos[0], photos[1], photos[3], photos[4], photos[0], photos[3], photos[0], photos[4]]
    assert ids[4:] == [f"{listed}:1", f"{listed}:5", f"{rows}:1", f"{table}:2"]
    close(vectors, reader.encode_image(kept))
    skipped = [json.loads(line) for line in (tmp_path / "v.skipped.jsonl").open()]
    reasons = ["cannot be decoded", "there is no such file", "it is empty", "not UTF-8", "it is empty", "of type int",
               "not JSON", "no JSON object", "has no t", "half a character", "it is empty"]  # fmt: skip
    assert [each["index"] for each in skipped] == [2, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17]
    for each, reason in zip(skipped, reasons, strict=True):
        assert reason in each["reason"], each
    assert skipped[0]["name"] == str(photos[2])
    assert skipped[1]["id"] == f"{listed}:2"
    assert f"left out: 11, listed in {tmp_path / 'v.skipped.jsonl'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.txt"], "there is no nowhere.txt; expected image files"),
        (["rows.csv"], "rows.csv is a table: say which column with --column; it has a, b"),
        (["rows.csv", "--column", "c"], "rows.csv has no column c; it has a, b"),
        (["rows.csv", "--column", "a", "--id", "d"], "rows.csv has no column d; it has a, b"),
        (["lines.txt", "--column", "a"], "--column is for tables"),
        (["empty.txt"], "there is nothing to encode"),
        (["folder"], "folder holds no images"),
        (["notes.md"], "notes.md ends in nothing that is known here"),
        (["broken.parquet", "--column", "a"], "broken.parquet is no parquet file"),
        (["broken.txt.gz"], "broken.txt.gz cannot be read"),
        (["open.csv", "--column", "a"], "open.csv: line 2 is no CSV"),
        (["short.csv", "--column", "a"], "inputs[0]: short.csv:1: the row has 1 cells, the head 2"),
        (["lines.txt", "--task", "nothing"], "unknown task 'nothing'"),
        (["lines.txt", "--truncate-dim", "17"], "truncate_dim"),
        (["lines.txt", "--processes", "0"], "--processes is 0"),
        (["lines.txt", "--out", "v.csv"], "--out is v.csv; expected a name that ends in .parquet or .npy"),
        (["lines.txt", "--out", "there.npy"], "there.npy exists already"),
        (["lines.txt", "--out", "no/v.npy"], "there is no folder no"),
        (["photo.png", "--kind", "text"], "photo.png is of images"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(model, tmp_path, monkeypatch, capsys, png, words, message):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "rows.csv": b"a,b\n1,2\n", "lines.txt": b"a disk\n", "empty.txt": b"", "notes.md": b"x",
        "broken.parquet": b"PAR1", "broken.txt.gz": b"\x1f\x8b\x08",
        "open.csv": b'a,b\n"1,2\n', "short.csv": b"a,b\n1\n", "there.npy": b"",
        "photo.png": png,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    assert main(["encode", str(model), *(words if "--out" in words else [*words, "--out", "v.npy"])]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "v.npy").exists()


def test_killed_at_any_write_it_goes_on_and_gives_the_same_file(model, tmp_path, small_parts, capsys):
    lines, undisturbed = tmp_path / "lines.txt", tmp_path / "whole.npy"
    lines.write_text("\n".join(TEXTS))
    assert main(["encode", str(model), str(lines), "--out", str(undisturbed)]) == 0
    for when in ("before", "after"):
        out, kills = tmp_path / f"{when}.npy", 0
        while not out.exists():
            # Ten parts, the statement, the ids and the vectors take their places one by one.
            pid = os.fork()
            if pid == 0:
                _encode_and_die(model, lines, out, when, kills if when == "before" else 1 + 2 * (kills // 10))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (-signal.SIGKILL)
            kills += 1
            assert kills < 20
        assert kills == (6 if when == "before" else 11)
        assert out.read_bytes() == undisturbed.read_bytes()
        assert out.with_suffix(".ids.jsonl").read_bytes() == undisturbed.with_suffix(".ids.jsonl").read_bytes()
    assert main(["encode", str(model), str(lines), "--out", str(tmp_path / "after.npy")]) == 2


def _encode_and_die(model, lines, out, when, writes):
    """In a child process: kills it when that many files have taken their places, or one more is about to."""
    rename, done = Path.rename, []

    def counted(self, target):
        if when == "before" and len(done) == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(self, target)
        done.append(target)
        if when == "after" and len(done) == writes:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = counted
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    try:
        main(["encode", str(model), str(lines), "--out", str(out)])
        os.kill(os.getpid(), signal.SIGKILL)  # it got to its end
    finally:
        os._exit(1)


def test_a_resume_takes_what_is_whole_and_the_same(model, reader, tmp_path, small_parts, monkeypatch, capsys):
    lines, out = tmp_path / "lines.txt", tmp_path / "v.npy"
    lines.write_text("\n".join(TEXTS))
    encode, counted = Encoder.part, []

    def part(self, entries, most=4):
        if len(counted) == most:
            raise UserError("stopped here")
        counted.append(entries[0].value)
        return encode(self, entries)

    arguments = ["encode", str(model), str(lines), "--out", str(out)]
    monkeypatch.setattr(Encoder, "part", part)
    assert main(arguments) == 2
    damaged = sorted((tmp_path / ".v.npy.parts").glob("*.npz"), key=lambda path: path.stat().st_mtime_ns)[1]
    damaged.write_bytes(damaged.read_bytes()[:-200])
    changed = ["another", *TEXTS[1:]]
    lines.write_text("\n".join(changed))
    counted.clear()
    monkeypatch.setattr(Encoder, "part", lambda self, entries: part(self, entries, 100))
    assert main(arguments) == 0
    assert counted == [changed[0], *(TEXTS[n] for n in (10, 40, 50, 60, 70, 80, 90))]
    close(encoded(out)[1], reader.encode_text(changed))
    said = capsys.readouterr().err
    assert "20 of 100 were encoded before" in said
    assert "1 parts in" in said  # the one of the old first line


def test_other_options_take_nothing_of_what_was_done(model, reader, tmp_path, small_parts, monkeypatch, capsys):
    lines, out = tmp_path / "lines.txt", tmp_path / "v.npy"
    lines.write_text("\n".join(TEXTS[:20]))
    arguments = ["encode", str(model), str(lines), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("stage_trainer.bulk.vectors.write", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    assert main([*arguments, "--task", "query"]) == 0
    assert "2 parts in" in capsys.readouterr().err
    close(encoded(out)[1], reader.encode_text(TEXTS[:20], task="query"))


def test_processes_end_when_the_one_that_started_them_is_killed(model, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(TEXTS * 100))
    code = "import sys; from stage_trainer.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["encode", str(model), str(lines), "--processes", "2", "--out", str(tmp_path / "v.npy")]
    with subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.DEVNULL) as first:
        own = Path(f"/proc/{first.pid}/task/{first.pid}/children")
        while len(children := own.read_text().split()) < 3:  # the third one counts multiprocessing's resources
            assert first.poll() is None
            time.sleep(0.02)
        first.kill()
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.02)
    assert not (tmp_path / "v.npy").exists()


def test_a_process_that_is_killed_costs_its_part_alone(model, reader, photos, tmp_path, capsys):
    """Two processes, of which one is killed while it starts; then two that end well."""
    lines, out = tmp_path / "lines.txt", tmp_path / "v.npy"
    lines.write_text("\n".join(TEXTS * 50))  # two parts, one for each
    arguments = ["encode", str(model), str(lines), str(tmp_path / "photos"), "--processes", "2", "--out", str(out)]

    def kill():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(children[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    assert main(arguments) == 2
    thread.join()
    assert "a process that encodes was killed by signal 9" in capsys.readouterr().err
    assert not out.exists()
    assert multiprocessing.active_children() == []
    assert main(arguments) == 0
    ids, vectors = encoded(out)
    assert ids == [*(f"{lines}:{n}" for n in range(1, 5001)), *map(str, photos)]
    close(vectors, np.concatenate([np.tile(reader.encode_text(TEXTS), (50, 1)), reader.encode_image(photos)]))


def test_a_model_may_be_named_as_on_the_hub(model, reader, tmp_path, monkeypatch, capsys):
    """For every command that takes a model, since all of them find it in one place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("a red disk\n")
    assert main(["encode", "owner/name", "lines.txt", "--out", "v.npy"]) == 2  # there is no network
    assert "hf download owner/name --local-dir FOLDER" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(hub, "local", lambda name: asked.append(name) or model)
    assert main(["encode", "owner/name", "lines.txt", "--out", "v.npy"]) == 0
    close(encoded(tmp_path / "v.npy")[1], reader.encode_text(["a red disk"]))
    assert main(["export", "owner/name", "out"]) == 0
    assert asked == ["owner/name"] * 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- owner/name" in card.split("---")[1]  # base_model
    assert "`owner/name` is under a licence that could not be found out" in card
    assert main(["encode", "no/such/name", "lines.txt", "--out", "w.npy"]) == 2
    assert "there is no no/such/name; expected an exported model" in capsys.readouterr().err
