"""What others' tars hold in place of texts: each is used, or replaced and named, and all commands agree on which."""

import io
import json
import tarfile

import pytest
from data_prep.cli import main
from data_prep.curation.passes import sample_at
from data_prep.errors import UserError as PrepError
from data_prep.inspection.summary import summarize
from data_prep.inspection.validate import validate
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image
from stage_trainer.data.drawn import Corrupt
from stage_trainer.errors import UserError
from stage_trainer.evaluation.retrieval import Pool
from stage_trainer.evaluation.text_retrieval import PairPool
from stage_trainer.recipe.read import load
from stage_trainer.run.ledger import Ledger
from stage_trainer.run.loader import batches
from stage_trainer.tasks import make_task
from text_tower import Tokenizer

WHOLE = {"text": "a dog", "language": "en", "origin": "human", "role": "name"}
DEEP = b"[" * 100_000 + b"]" * 100_000
TEXTS = {  # what stands in place of a list of texts, and whether it can be used
    "strings": (["a dog", "ein Hund"], False),
    "a string": ("a dog", False),
    "without a language": ([{"text": "a dog"}], False),
    "without a text": ([{"language": "en"}], False),
    "numbers": ([1, 2.5, True], False),
    "null": (None, False),
    "nulls": ([None], False),
    "an object": (WHOLE, False),
    "lists": ([[["a dog"]]], False),
    "a number as text": ([{**WHOLE, "text": 7}], False),
    "a list as language": ([{**WHOLE, "language": ["en"]}], False),
    "a list as role": ([{**WHOLE, "role": ["name"]}], False),
    "null as origin": ([{**WHOLE, "origin": None}], False),
    "nothing as text": ([{**WHOLE, "text": " \n"}], False),
    "half a character": ([{**WHOLE, "text": "a \ud83d dog"}], False),
    "half a character as language": ([{**WHOLE, "language": "\udcff"}], False),
    "a path as language": ([{**WHOLE, "language": "e/n"}], False),
    "a second one that is none": ([WHOLE, None], False),
    "a NUL": ([{**WHOLE, "text": "a \0 dog"}], True),
    "more than is known": ([{**WHOLE, "more": [None, {"x": 1}]}], True),
}
OTHERS = {  # a whole .json, beside a good list of texts
    "no object": (b"[1]", False),
    "null": (b"null", False),
    "deep nesting": (DEEP, False),
    "a long number": (b'{"captions": ' + b"9" * 5000 + b"}", False),
    "no UTF-8": (b'{"captions": "\xff"}', False),
    "a list as item": ({"item": ["i"]}, False),
    "null as item": ({"item": None}, True),
    "a number as item": ({"item": 7}, True),
    "half a character as item": ({"item": "\ud83d"}, True),
    "a text as score": ({"score": "high"}, False),
}
PARTS = {"image-short": ["captions"], "text-pairs": ["query", "target"], "text-triplets": ["query", "negatives"]}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "png")
    return buffer.getvalue()


def whole(kind: str) -> dict:
    if kind.startswith("image"):
        return {"captions": [WHOLE]}
    sides = {"query": [WHOLE], "target": [{**WHOLE, "text": "ein Hund"}]}
    return {**sides, "negatives": [[{**WHOLE, "text": "a cat"}]]} if kind == "text-triplets" else sides


def cases(kind: str) -> dict[str, tuple[bytes, bool]]:
    """{name: (.json, whether it can be used)}"""
    found = {}
    for part in PARTS[kind]:
        for name, (value, usable) in TEXTS.items():
            found[f"{part}: {name}"] = {**whole(kind), part: [value] if part == "negatives" else value}, usable
    if kind == "text-triplets":
        found["negatives: none"] = {**whole(kind), "negatives": []}, False
    for name, (value, usable) in OTHERS.items():
        found[name] = (value if isinstance(value, bytes) else {**whole(kind), **value}), usable
    return {n: (v if isinstance(v, bytes) else json.dumps(v).encode(), usable) for n, (v, usable) in found.items()}


def members(kind: str, content: bytes) -> dict[str, bytes]:
    return {"png": png(), "json": content} if kind.startswith("image") else {"json": content}


@pytest.fixture(params=PARTS)
def made(request, tmp_path):
    """A data set: 80 good samples, "g0" …, then one of each case, "c00" …; its kind; the keys that can be used."""
    kind = request.param
    with DatasetWriter(tmp_path / "train" / kind / "made", kind=kind, source="made") as writer:
        for number in range(80):
            writer.write(f"g{number}", members(kind, json.dumps(whole(kind)).encode()), languages=["en"], tokens=None)
        for number, (content, _) in enumerate(cases(kind).values()):
            writer.write(f"c{number:02d}", members(kind, content), languages=["en"], tokens=None)
    good = {f"c{number:02d}" for number, (_, usable) in enumerate(cases(kind).values()) if usable}
    return kind, Dataset.open(tmp_path / "train" / kind / "made"), {f"g{number}" for number in range(80)} | good


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("drawn") / "corpus"
    assert main(["corpus", str(corpus), "--drawn"]) == 0
    return Tokenizer.from_file(corpus / "tokenizer.model")


def test_training_uses_or_replaces_each_and_enters_it_in_the_ledger(made, tmp_path, recipes, tokenizer):
    kind, data, usable = made
    task, other = ("image_text", "text") if kind.startswith("image") else ("text", "image_text")
    overrides = [
        f"corpus={tmp_path}", f"data={{{task}: [{{path: {kind}/made}}]}}", f"batch={{{task}: {len(data)}, {other}: 0}}",
    ]  # fmt: skip
    recipe = load(recipes / "drawn.yaml", overrides, 1).recipe
    stage = make_task(recipe, 1).make_batches(tokenizer, 0, 1)
    (_, drawn), (_, again) = (next(batches(stage, 0, 1, 0)) for _ in range(2))  # every sample once
    assert {entry.key for entry in drawn.corrupt} == {data.row(n).key for n in range(len(data))} - usable
    assert drawn.corrupt == again.corrupt
    assert sum(drawn.of_sources([f"{kind}/made"])) == sum(drawn.texts.values())
    ledger = Ledger(tmp_path / "corrupt.jsonl", limit=1.0, active=True)
    ledger.enter(drawn.corrupt, step=0, drawn=1000)
    lines = (tmp_path / "corrupt.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["reason"] for line in lines] == [entry.reason for entry in drawn.corrupt]


def test_validate_inspect_and_index_say_the_same_before(made, tmp_path):
    kind, data, usable = made
    keys = {data.row(n).key for n in range(len(data))}
    problems = list(validate(data.directory))
    for name in keys:
        assert (name in usable) == (not any(f"'{name}'" in problem.where for problem in problems)), name
    found = summarize(data.directory, look_at=len(data), examples=1)
    assert {line.partition(":")[0] for line in found.unreadable} == keys - usable
    assert found.sampled == len(usable)

    tar = tmp_path / "theirs.tar"
    with tarfile.open(tar, "w") as file:
        for number in range(len(data)):
            for ending, content in data.read(number).items():
                info = tarfile.TarInfo(f"{data.row(number).key}.{ending}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    assert main(["index", str(tar), "--out", str(tmp_path / "out"), "--kind", kind, "--workers", "1"]) == 0
    indexed = Dataset.open(tmp_path / "out" / kind / "indexed")
    assert {indexed.row(n).key for n in range(len(indexed))} == usable
    receipt = json.loads((indexed.directory / "receipt.json").read_bytes())
    assert sum(receipt["dropped"].values()) == len(keys - usable)
    assert not any("Hund" in reason or "7" in reason for reason in receipt["dropped"]), "reasons are few and fixed"
    assert list(validate(indexed.directory)) == []


def test_evaluation_and_curation_name_the_first_that_they_meet(made, tmp_path):
    kind, data, usable = made
    for number in range(len(data)):
        key, content = data.row(number).key, data.read(number)
        alone = tmp_path / "alone" / key
        with DatasetWriter(alone, kind=kind, source="made") as writer:
            writer.write(key, content, languages=["en"], tokens=None)
        pool = Pool if kind.startswith("image") else PairPool
        if key in usable:
            pool.open(alone)
            assert sample_at(Dataset.open(alone), 0).texts[0][0]["language"] == "en"
        else:
            with pytest.raises(UserError, match=f"sample {key}: "):
                pool.open(alone)
            with pytest.raises(PrepError, match=f"sample '{key}': .*data-prep validate"):
                sample_at(Dataset.open(alone), 0)


@pytest.mark.parametrize("made", ["text-pairs", "text-triplets"], indirect=True)
def test_masked_language_model_training_replaces_each_too(made, tmp_path, recipes, tokenizer):
    kind, data, usable = made
    overrides = [f"corpus={tmp_path}", f"data={{masked_lm: [{kind}/made]}}", f"batch.masked_lm={len(data)}"]
    recipe = load(recipes / "masked-lm.yaml", overrides, 1).recipe
    _, drawn = make_task(recipe, 1).make_batches(tokenizer, 0, 1)[0]
    assert {entry.key for entry in drawn.corrupt} >= {data.row(n).key for n in range(len(data))} - usable


def test_the_ledger_takes_a_name_that_no_file_could_hold(tmp_path):
    ledger = Ledger(tmp_path / "corrupt.jsonl", limit=1.0, active=True)
    ledger.enter([Corrupt("00000.tar", "k\udcff", "half \ud83d")], step=0, drawn=1)
    (line,) = (tmp_path / "corrupt.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["key"] == "k\udcff"
