"""What an option of a command cannot mean is refused in one line, before anything expensive, and leaves nothing."""

import argparse
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_prep.shards import DatasetWriter
from PIL import Image
from stage_trainer.cli import main, parser
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.plan import planner

LONG = "n" * 260
RECIPES = Path(__file__).parents[2] / "launch/recipes"
PLAN = ["plan", "--recipe", str(RECIPES / "drawn.yaml")]
TRAIN = ["train", "--recipe", str(RECIPES / "drawn.yaml"), "--stage", "1"]
REPORT = ["report", "--recipe", str(RECIPES / "drawn.yaml")]
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e400", "", "many")
PLACES = ("missing/x.png", "file/x.png", "data", "/dev/null", "/proc/x.png", f"{LONG}.png", "")
"""No folder, a file for a folder, a folder, no ordinary file, where nobody can write, a name that is too long."""

TABLE = [
    *([*PLAN, f"--{name}={value}"] for value in NUMBERS
      for name in ("gpus", "peak", "bandwidth", "loader", "price", "cores", "fetch", "mean-tokens", "memory", "stage")),
    *([*PLAN, f"--gpu={value}"] for value in ("", "h1000", "h100-80gb\n")),
    [*PLAN, "--gpus=1000001"], [*PLAN, "--peak=165"], [*PLAN, "--price=1e300"], [*PLAN, "--bandwidth=900"],
    [*PLAN, f"--memory={'9' * 400}TB"], [*PLAN, "--memory=24 GiBs"], [*PLAN, "--memory=0.0GiB"],
    *([command, *more, f"--recipe={value}"] for command, *more in (["plan"], ["train", "--stage=1"], ["report"])
      for value in ("", "missing.yaml", "data", "file/recipe.yaml", LONG, "/dev/null", "model/config.json")),
    *([*command, setting] for command in (PLAN, TRAIN, REPORT)
      for setting in ("output=", "seed=-1", "max_corrupt=nan", "=", "steps", "no.such.key=1")),
    *([*TRAIN[:-2], f"--stage={value}"] for value in ("0", "-1", "4", "nan", "", "1.5")),
    *([*TRAIN, f"output={value}"] for value in ("file", "file/run", "/dev/null", "/proc/run", LONG)),
    *([*REPORT, f"output={value}"] for value in ("file", "missing", "/dev/null", LONG)),
    *(["evaluate", "model", "data", f"--json={value}"] for value in PLACES),
    *(["search", "model", "data", f"--out={value}"] for value in (*PLACES, "x", "x.txt", ".png")),
    *([command, "model", "data", f"--max-pixels={value}"] for command in ("evaluate", "search")
      for value in (*NUMBERS, "1e6", "178956971")),
    *([command, value, "data"] for command in ("evaluate", "search")
      for value in ("", "missing", "file", "data", LONG)),
    *([command, "model", value] for command in ("evaluate", "search")
      for value in ("", "missing", "file", "model", LONG, "s3://bucket/data")),
    *(["search", "model", "data", query] for query in ("", "  ")),
    *(["export", value, "out"] for value in ("", "missing", "file", "data", LONG)),
    *(["export", "model", value] for value in ("", "data", "file", "file/out", "/dev/null", "/proc/out", LONG)),
    *(["export", "model", "out", f"{option}={value}"] for option in ("--format", "--lora", "--dtype")
      for value in ("", "nan", "both")),
    ["export", "model", "out", "--dtype=float32"], ["export", "model", "out", "--format=trilith", "--lora=kept"],
    ["export", "model", "out", "--format=jina-clip", "--dtype=q4"],
    ["export", "model", "out", "--format=onnx", "--lora=kept"],
    *(["export", "model", "out", f"--format={name}", "--task=a"] for name in ("common", "trilith", "jina-clip")),
    *(["push", value, "owner/name"] for value in ("", "missing", "file", "data", "model", LONG)),
    *(["push", "model", value] for value in ("", "name", "a/b/c", "../name", "owner/", f"owner/{LONG}", "a/b\n")),
    *(["push", "model", "owner/name", f"--message={value}"] for value in ("", "  ", "\n")),
    *(["export", "model", "out", "--format=open-clip", f"--repository={value}"]
      for value in ("", "name", "a/b/c", "a/b\n")),
    ["export", "model", "out", "--repository=a/b"], ["export", "model", "out", "--format=open-clip", "--lora=kept"],
    *(["embed", f"--recipe={value}", "--stage=1"] for value in ("", "missing", "data", LONG)),
    *(["embed", f"--stage={value}"] for value in ("", "0", "nan", "1.5")),
    *(["encode", value, "data", "--out=x.npy"] for value in ("", "missing", "file", "data", LONG)),
    *(["encode", "model", value, "--out=x.npy"] for value in ("", "missing", "file", "model", "/dev/null", LONG)),
    *(["encode", "model", "data", f"--out={value}"] for value in
      ("missing/x.npy", "file/x.npy", "data", "/dev/null", "/proc/x.npy", f"{LONG}.npy", "", "x", "x.csv", ".npy")),
    *(["encode", "model", "data", "--out=x.npy", f"--{name}={value}"] for value in NUMBERS
      for name in ("truncate-dim", "max-length", "batch-size", "processes", "threads", "max-pixels")),
    *(["encode", "model", "data", "--out=x.npy", f"--{name}={value}"] for value in ("", "  ", "\n")
      for name in ("task", "column", "id", "kind", "errors", "device", "dtype")),
    *(["encode", "model", "data", "--out=x.npy", *more] for more in
      (["--column=a"], ["--id=a"], ["--kind=picture"], ["--errors=ignore"], ["--device=tpu"], ["--dtype=half"])),
    *(["evaluate", "model", "data", f"--precision={value}"] for value in ("", "  ", "float32", "half", "int8,int8")),
    *(["encode", "model", "data", "--out=x.npy", f"--precision={value}"] for value in ("", "  ", "half", "float64")),
    *(["encode", "model", "data", "--out=x.npy", "--precision=int8", f"--calibration={value}"] for value in
      ("", "missing", "file", "data", "/dev/null", LONG)),
    ["encode", "model", "data", "--out=x.npy", "--calibration=file"],
    *(["search", "model", value, "a", f"--{name}={number}"] for value in ("data", "vectors.npy") for number in NUMBERS
      for name in ("top-k", "rescore-multiplier")),
    *(["search", "model", "vectors.npy", "a", f"--also={value}"] for value in ("", "missing", "file", "data", LONG)),
    *(["search", "model", "vectors.npy", "a", f"--task={value}"] for value in ("", "  ", "\n")),
    *(["search", "model", "data", "a", f"--{name}"] for name in ("also=vectors.npy", "task=a")),
    *(["mteb", value, "STSBenchmark"] for value in ("", "missing", LONG)),
    *(["mteb", "model", "STSBenchmark", f"--dim={value}"] for value in NUMBERS),
    *(["mteb", "model", "STSBenchmark", f"--data={value}"] for value in ("", "missing", "file", LONG)),
    *(["mteb", "model", "STSBenchmark", f"--out={value}"] for value in
      ("", "file", "file/out", "/dev/null", "/proc/out", LONG)),
    *(["mteb", "model", "STSBenchmark", f"--max-length={value}"] for value in (*NUMBERS, "1")),
    *(["mteb", "model", "STSBenchmark", f"--query-task={value}"] for value in ("", "  ", "\n")),
    *(["mteb", "model", "STSBenchmark", f"--max-pixels={value}"] for value in NUMBERS),
    *(["mteb", "model", value] for value in ("", "  ", "NoSuchTask", "STSBenchmark:", f"STSBenchmark:{LONG}")),
    ["evaluate", "stage1", "data"], ["evaluate", "model"], ["evaluate", "model", "data", "--max-length=77"],
    ["evaluate", "model", "data", "--beside=model"], ["evaluate", "model", "data", "--query-task=a"],
    *(["evaluate", "model", "sets", f"--suite={value}"] for value in ("", "nan", "both", "text", "documents")),
    *(["evaluate", "model", "sets", f"--table={value}"] for value in ("", "1", "6", "8", "nan", "vidore-v2")),
    ["evaluate", "model", "sets", "--suite=all", "--table=7"],
    ["evaluate", "model", "sets", "--table=7", "--by-language"],
    *(["evaluate", "model", "sets", "--table=7", f"--max-length={value}"] for value in (*NUMBERS, "1")),
    *(["evaluate", "model", "sets", "--table=7", f"--query-task={value}"] for value in ("", "  ", "\n")),
    *(["evaluate", "model", "sets", "--table=7", f"--beside={value}"] for value in ("", "missing", "model", LONG)),
    *(["evaluate", "model", "sets", "--table=7", f"--out={value}"] for value in
      ("", "file", "file/out", "/dev/null", "/proc/out", LONG)),
    *(["evaluate", value, "sets", "--suite=all"] for value in ("", "missing", LONG)),
    *(["evaluate", "model", value, "--suite=all"] for value in ("", "missing", "file", "model", LONG, "s3://bucket/x")),
    ["evaluate", "stage1", "data"],
    *(["demo", value, "data"] for value in ("", "missing", "file", "data", LONG)),
    *(["demo", "model", value] for value in ("", "missing", LONG, "s3://bucket/data")),
    *(["demo", "model", "data", f"--index={value}"] for value in ("", "file", "file/x", "/dev/null", "/proc/x", LONG)),
    *(["demo", "model", "data", f"--port={value}"] for value in (*NUMBERS, "65536")),
    *(["demo", "model", "data", f"--host={value}"] for value in ("", " ", "256.0.0.1", "a b")),
    *(["demo", "model", "data", f"--device={value}"] for value in ("", "tpu", "cuda:0")),
    *(["demo", "model", "data", f"--max-pixels={value}"] for value in NUMBERS),
    *(["report", value] for value in ("", "missing", "file", "data", LONG)),
    *(["report", "stage1", f"--out={value}"] for value in
      ("missing/x.html", "file/x.html", "data", "/dev/null", "/proc/x.html", f"{LONG}.html", "", "x", ".html")),
    *(["report", "stage1", f"--data={value}"] for value in ("", "missing", "file", "model", "s3://bucket/data")),
    *(["report", "stage1", f"--{name}={value}"] for value in NUMBERS for name in ("searched", "max-pixels")
      if (name, value) != ("searched", "0")),
]  # fmt: skip
SWITCHES = {
    "--other-files",
    "--private",
    "--dry-run",
    "--no-normalize",
    "--start-over",
    "--by-language",
    "--local_rank",
    "--local-rank",
    "-h",
    "--help",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set, a file, something like a model, and a stage in which evaluation.json cannot be written."""
    folder = tmp_path_factory.mktemp("options")
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    captions = json.dumps({"captions": [{"text": "a", "language": "en", "role": "name"}]}).encode()
    with DatasetWriter(folder / "data", kind="image-short", source="data") as writer:
        writer.write("s", {"png": picture.getvalue(), "json": captions}, languages=["en"], tokens=None)
    with DatasetWriter(folder / "sets/flickr30k", kind="image-short", source="flickr30k") as writer:
        writer.write("s", {"png": picture.getvalue(), "json": captions}, languages=["en"], tokens=None)
    (folder / "file").write_text("a file")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    checkpoint = folder / "stage1/step-0000001"
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 1, "files": {}}))
    (folder / "stage1/evaluation.json").mkdir()
    return folder


def expensive(*arguments, **options):
    raise AssertionError("this takes long")


def named(words):
    return " ".join(word.removeprefix(str(RECIPES))[:20] for word in words)


@pytest.mark.parametrize("words", TABLE, ids=named)
def test_what_cannot_be_meant_is_one_line_before_anything_expensive(folder, monkeypatch, capsys, words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(DualEncoder, "from_pretrained", expensive)
    monkeypatch.setattr(planner, "plan_stage", expensive)
    before = sorted(folder.rglob("*"))
    try:
        code = main(words)
    except SystemExit as error:  # argparse's
        code = error.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    progress = ("loading PyTorch …", "loading mteb …")
    lines = [line for line in said.err.splitlines() if line not in progress and not line.startswith("taking ")]
    usage = lines[0].startswith("usage: ")
    assert lines[-1 if usage else 0].startswith("stage-trainer")
    assert usage or len(lines) == 1 or words[0] == "report", said.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["evaluate", "search"])
def test_max_pixels_is_heeded(folder, monkeypatch, capsys, command):
    """The picture has 64."""
    monkeypatch.chdir(folder)
    text = SimpleNamespace(config=SimpleNamespace(output_width=8))
    model = SimpleNamespace(matryoshka_dims=None, text=text)
    monkeypatch.setattr(DualEncoder, "from_pretrained", lambda path: model)
    assert main([command, "model", "data", "--max-pixels=63"]) == 2
    said = "stage-trainer: data, sample s is 8x8 pixels, more than the 63 allowed; shrink it or raise max_pixels"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert not (folder / "search.png").exists()


def test_every_option_and_argument_is_in_the_table():
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    for command, sub in commands.choices.items():
        rows = [words for words in TABLE if words[0] == command]
        for action in sub._actions:
            if SWITCHES & {*action.option_strings}:
                continue
            of_action = [w for w in rows if any(word.startswith(o) for word in w for o in action.option_strings)]
            assert len(of_action if action.option_strings else rows) > 2, f"{command} {action.dest}"
