"""Vectors in few bits: sentence-transformers' bytes, files that say how they are stored, search with rescoring."""

import json
import shutil
from types import SimpleNamespace

import faiss
import numpy as np
import pyarrow.parquet as parquet
import pytest
from data_prep.shards import DatasetWriter
from sentence_transformers.util import quantization as reference
from stage_trainer.bulk import job
from stage_trainer.bulk.search import search
from stage_trainer.bulk.stored import Stored
from stage_trainer.cli import main
from stage_trainer.errors import UserError
from stage_trainer.evaluation.report import read_figures
from stage_trainer.metrics.quantization import quantize_embeddings, ranges_of, restored
from stage_trainer.metrics.rescoring import exact, stored_as
from stage_trainer.metrics.retrieval import unit
from stage_trainer.pages.sections import precisions

PRECISIONS = ("int8", "uint8", "binary", "ubinary")
TEXTS = [f"a red disk {number} {'blue ' * (number % 7)}" for number in range(120)]


def vectors(count=300, dims=32, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(count, dims))).astype(np.float32)


@pytest.mark.parametrize("precision", [*PRECISIONS, "float32"])
def test_bytes_are_those_of_sentence_transformers(precision):
    rows, others = vectors(), 3 * vectors(40, seed=1)
    ranges = np.vstack((others.min(axis=0), others.max(axis=0)))
    for more in ({}, {"ranges": ranges}, {"ranges": ranges.astype(np.float64)}, {"calibration_embeddings": others}):
        for given in (rows, 5 * rows, rows.astype(np.float64), rows[:1] if more else rows):  # beyond the ranges, too
            ours = quantize_embeddings(given, precision, **more)
            theirs = reference.quantize_embeddings(given, precision, **more)
            assert ours.dtype == theirs.dtype
            assert ours.tobytes() == theirs.tobytes()


def test_restored_numbers_are_within_half_a_step():
    rows = vectors()
    ranges = ranges_of(rows)
    for precision in ("int8", "uint8"):
        back = restored(quantize_embeddings(rows, precision, ranges), precision, ranges)
        assert (np.abs(back - rows) <= 0.5001 * (ranges[1] - ranges[0]) / 255 + (rows == ranges[1]) * 1e-2).all()
    for precision in ("binary", "ubinary"):
        assert np.array_equal(restored(quantize_embeddings(rows, precision), precision) > 0, rows > 0)


def _nan():
    rows = vectors(3)
    rows[1, 2] = np.nan
    return rows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_embeddings(vectors(3, 12), "binary"), "eight dims into a byte, and vectors have 12"),
        (lambda: quantize_embeddings(vectors(1), "int8"), "1 calibration vector has none"),
        (lambda: quantize_embeddings(vectors(3), "int8", calibration_embeddings=vectors(1)), "1 calibration vector"),
        (lambda: quantize_embeddings(np.ones((5, 8)), "uint8"), "and 3 more have no"),
        (lambda: quantize_embeddings(_nan(), "binary"), "nan or inf, first in row 1"),
        (lambda: quantize_embeddings(vectors(3), "int8", calibration_embeddings=_nan()), "vectors hold nan or inf"),
        (lambda: quantize_embeddings(vectors(3), "int8", ranges=np.ones((2, 4))), "ranges have the shape [2, 4]"),
        (lambda: quantize_embeddings(vectors(3), "int8", ranges=np.full((2, 32), np.inf)), "ranges hold nan or inf"),
        (lambda: quantize_embeddings(np.ones((2, 8), np.int8), "binary"), "the embeddings are of int8"),
        (lambda: quantize_embeddings(1e6 * vectors(3), "float16"), "too large for float16"),
        (lambda: quantize_embeddings(vectors(3), "int4"), "precision is 'int4'; expected one of float32"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_by_name(call, message):
    with pytest.raises(UserError) as raised:
        call()
    assert message in str(raised.value)


def test_bits_are_ranked_as_faiss_and_sentence_transformers_rank_them():
    rows, queries = vectors(500, 64), vectors(20, 64, seed=3)
    packed = quantize_embeddings(rows, "ubinary")
    for multiplier in (4, 100):  # the latter rescores everything
        scores = stored_as("ubinary", 5, multiplier)(rows)(queries)
        theirs, _, _ = reference.semantic_search_faiss(
            queries, packed, corpus_precision="ubinary", top_k=5, rescore_multiplier=multiplier, output_index=True
        )
        for query, own, found in zip(quantize_embeddings(queries, "ubinary"), scores, theirs, strict=True):
            by_them = [hit["corpus_id"] for hit in found]
            if multiplier == 100:
                assert np.argsort(-own)[:5].tolist() == by_them
            else:  # where the last candidates have as many signs in common, either may be taken
                distances = np.unpackbits(packed ^ query, axis=1).sum(axis=1)
                taken = np.flatnonzero(np.isfinite(own))
                assert len(taken) == 20
                assert sorted(distances[taken]) == sorted(distances)[:20]
    index = faiss.IndexBinaryFlat(64)
    index.add(packed)
    nearest = index.search(quantize_embeddings(queries, "ubinary"), 20)[0]
    for own, distances in zip(stored_as("ubinary", 20, 1)(rows)(queries), nearest, strict=True):
        assert np.isfinite(own).sum() == len(distances)


def test_steps_are_ranked_as_sentence_transformers_rescores_them():
    rows, queries = vectors(500, 64), vectors(20, 64, seed=3)
    ranges = ranges_of(rows)
    theirs, _ = reference.semantic_search_faiss(
        queries, quantize_embeddings(rows, "uint8", ranges), corpus_precision="uint8", top_k=5, ranges=ranges,
        rescore_multiplier=100,
    )[:2]  # fmt: skip
    for precision in ("int8", "uint8"):
        ours = np.argsort(-stored_as(precision, 5)(rows)(queries), axis=1)[:, :5]
        assert ours.tolist() == [[hit["corpus_id"] for hit in found] for found in theirs]
    assert np.array_equal(stored_as("float32", 5)(rows)(queries), exact(rows)(queries))


@pytest.fixture(scope="module")
def model(reader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    reader.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "lines.txt"
    path.write_text("\n".join(TEXTS))
    return path


def encoded(model, lines, out, *options):
    assert main(["encode", str(model), str(lines), "--out", str(out), *options]) == 0
    return Stored(out)


@pytest.mark.parametrize("name", ["v.npy", "v.parquet"])
def test_encode_writes_these_bytes_and_says_how(model, reader, lines, tmp_path, name, monkeypatch):
    monkeypatch.setattr(job, "_TEXTS", 50)  # several parts have the ranges of all
    rows = reader.encode_text(TEXTS)
    for precision in (*PRECISIONS, "float16"):
        out = tmp_path / precision / name
        out.parent.mkdir()
        file = encoded(model, lines, out, "--precision", precision)
        codes = np.concatenate([block.codes for block in file.blocks()])
        if name == "v.npy":
            assert np.array_equal(np.load(out), codes)
        expected = rows.astype(np.float16) if precision == "float16" else reference.quantize_embeddings(rows, precision)
        assert codes.dtype == expected.dtype
        assert np.mean(codes != expected) < 0.02  # batches of other lengths differ in the last bits of float32
        assert (file.statement.precision, file.statement.dims, file.count) == (precision, 16, 120)
        assert [i for block in file.blocks() for i in block.ids][:2] == [f"{lines}:1", f"{lines}:2"]
        if precision in ("int8", "uint8"):
            low, high = np.array(file.statement.ranges, np.float32)
            assert np.allclose((low, high), (rows.min(axis=0), rows.max(axis=0)), atol=1e-6)


def test_calibration_gives_two_files_the_same_ranges_and_others_are_not_mixed(model, lines, tmp_path, capsys):
    few = tmp_path / "few.txt"
    few.write_text("\n".join(TEXTS[:3]))
    plain = encoded(model, lines, tmp_path / "plain.npy")
    first = encoded(model, few, tmp_path / "a.npy", "--precision", "int8", "--calibration", str(plain.path))
    second = encoded(model, lines, tmp_path / "b.parquet", "--precision", "int8", "--calibration", str(first.path))
    assert first.statement.ranges == second.statement.ranges
    own = encoded(model, few, tmp_path / "c.npy", "--precision", "int8")
    assert "the ranges of 3 vectors are a poor guess" in capsys.readouterr().err
    bits = encoded(model, lines, tmp_path / "d.npy", "--precision", "binary")
    ask = ["search", str(model), str(first.path), "a red disk", "--also"]
    assert main([*ask, str(second.path)]) == 0
    assert "a red disk" in capsys.readouterr().out
    for other, words in (
        (own, "differ in ranges"),
        (bits, "differ in precision, ranges"),
        (plain, "differ in precision"),
    ):
        assert main([*ask, str(other.path)]) == 2
        assert words in capsys.readouterr().err
    for given, words in (
        ([few, "--calibration", bits.path, "--precision", "int8"], "holds binary, bits without ranges"),
        ([few, "--calibration", plain.path, "--precision", "binary"], "--calibration is of int8 and uint8"),
        ([few, "--calibration", plain.path, "--precision", "int8", "--truncate-dim", "8"], "differs from what"),
        ([few, "--calibration", few, "--precision", "int8"], "is no file of vectors"),
        ([few, "--truncate-dim", "12", "--precision", "binary"], "eight dims into a byte, and vectors have 12"),
    ):  # fmt: skip
        assert main(["encode", str(model), *map(str, given), "--out", str(tmp_path / "e.npy")]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "e.npy").exists()


def test_one_vector_and_equal_ones_have_no_range_and_what_is_done_stays(model, tmp_path, capsys):
    one = tmp_path / "one.txt"
    for content, words in (("a disk\n", "1 calibration vector has none"), ("a disk\na disk\n", "have no range")):
        one.write_text(content)
        asked = ["encode", str(model), str(one), "--out", str(tmp_path / "v.npy")]
        assert main([*asked, "--precision", "int8"]) == 2
        assert words in capsys.readouterr().err
    assert main([*asked, "--precision", "float16"]) == 0
    assert "2 of 2 were encoded before" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["float32", "float16", *PRECISIONS])
def test_search_finds_a_text_by_itself_in_every_precision(model, reader, lines, tmp_path, capsys, precision):
    parts = []
    for number in range(2):
        half = tmp_path / f"{number}.txt"
        half.write_text("\n".join(TEXTS[60 * number : 60 * number + 60]))
        options = ["--precision", precision]
        if precision.endswith("int8"):
            options += ["--calibration", str(encoded(model, lines, tmp_path / f"all{number}.npy").path)]
        parts.append(encoded(model, half, tmp_path / f"{number}.{'npy' if number else 'parquet'}", *options))
    queries = reader.encode_text(TEXTS[55:65])
    ids = [i for part in parts for block in part.blocks() for i in block.ids]
    exactly = queries @ reader.encode_text(TEXTS).T
    for query, hits in zip(exactly, search(parts, queries, 6, 4), strict=True):
        assert len({hit.id for hit in hits}) == 6
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        tolerance = 0.3 if "binary" in precision else 0.01
        assert query[ids.index(hits[0].id)] >= query.max() - tolerance
    capsys.readouterr()
    assert main(["search", str(model), str(parts[0].path), TEXTS[3], "--top-k", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_vectors_of_another_model_are_searched_only_if_the_user_says_that_it_is_the_same(
    model, lines, tmp_path, capsys
):
    file = encoded(model, lines, tmp_path / "v.npy")
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    config = copy / "config.json"
    config.write_text(config.read_text() + "\n")
    asked = ["search", str(copy), str(file.path), TEXTS[3], "--top-k", "1"]
    assert main(asked) == 2
    assert "was made by another model" in capsys.readouterr().err
    assert main([*asked, "--other-files"]) == 0
    assert f"{lines}:4" in capsys.readouterr().out


def test_what_has_no_effect_on_a_search_is_refused(model, lines, tmp_path, capsys):
    file = encoded(model, lines, tmp_path / "v.npy")
    assert main(["search", str(model), str(file.path), "a disk", "--rescore-multiplier", "8"]) == 2
    assert "--rescore-multiplier is of binary and ubinary" in capsys.readouterr().err
    for option in (["--top-k", "0"], ["--rescore-multiplier", "0"], ["--other-files"]):
        assert main(["search", str(model), str(tmp_path), "a disk", *option]) == 2
        assert f"{option[0]} is of files of vectors" in capsys.readouterr().err


def test_files_that_do_not_say_how_they_are_stored_are_refused(model, lines, tmp_path, capsys):
    file = encoded(model, lines, tmp_path / "v.npy", "--precision", "int8")
    beside = tmp_path / "v.vectors.json"
    content = json.loads(beside.read_text())

    def ask(path, words, *more):
        assert main(["search", str(model), str(path), "a disk", *more]) == 2
        assert words in capsys.readouterr().err

    for change, words in (
        ({"precision": "float32", "ranges": None}, "holds int8 [120, 16], and v.vectors.json says float32"),
        ({"ranges": None}, "int8 and ranges do not go together"), ({"dims": 8}, "ranges have the shape"),
        ({"format": "x"}, "its format is not"),
    ):  # fmt: skip
        beside.write_text(json.dumps(content | change))
        ask(file.path, words)
    beside.unlink()
    ask(file.path, "v.vectors.json, which says how the vectors are stored, cannot be read")
    table = parquet.read_table(encoded(model, lines, tmp_path / "w.parquet").path).replace_schema_metadata({})
    parquet.write_table(table, tmp_path / "x.parquet")
    ask(tmp_path / "x.parquet", "does not say how its vectors are stored")
    ask(encoded(model, lines, tmp_path / "y.npy", "--no-normalize").path, "not of length one (--no-normalize)")
    ask(tmp_path / "w.parquet", "--top-k is 0", "--top-k", "0")
    (tmp_path / "w.parquet").write_bytes((tmp_path / "w.parquet").read_bytes()[:-30])
    ask(tmp_path / "w.parquet", "is no parquet file")


def test_evaluate_measures_precisions_beside_float32_from_one_embedding(model, png, tmp_path, capsys):
    from PIL import Image

    with DatasetWriter(tmp_path / "data" / "pool", kind="image-short", source="drawn") as writer:
        for number in range(12):
            (tmp_path / "i.png").unlink(missing_ok=True)
            Image.new("RGB", (16, 16), (20 * number, 255 - 20 * number, 7 * number)).save(tmp_path / "i.png")
            content = {"captions": [{"text": f"a disk {number} {'red ' * number}", "language": "en"}]}
            members = {"png": (tmp_path / "i.png").read_bytes(), "json": json.dumps(content).encode()}
            writer.write(f"s{number}", members, languages=["en"], tokens=4)
    out = tmp_path / "f.json"
    asked = ["evaluate", str(model), str(tmp_path / "data"), "--json", str(out)]
    assert main([*asked, "--precision", "int8, float16,binary"]) == 0
    shown = capsys.readouterr().out
    pool = read_figures(out)["drawn"]
    assert list(pool["stored"]) == ["int8", "float16", "binary"]
    assert pool["stored"]["float16"]["recall_at_5"] == pool["recall_at_5"]
    assert "stored in" in shown
    assert "binary         2" in " ".join(shown.split("\n"))
    for words, message in (
        ("int4", "--precision has 'int4'"),
        ("int8,int8", "names int8 twice"),
        ("float32", "beside float32"),
    ):
        assert main([*asked, "--precision", words]) == 2
        assert message in capsys.readouterr().err


def test_the_page_has_precisions_beside_the_matryoshka_curve():
    pool = {
        "recall_at_5": {"text→image": {"16": {"mean": 0.5}, "8": {"mean": 0.25}}},
        "stored": {"binary": {"recall_at_5": {"text→image": {"16": {"mean": 0.4}, "8": {"mean": 0.1}}}}},
    }
    run = SimpleNamespace(name="run", evaluated=[SimpleNamespace(pools={"p": pool})])
    table = precisions([run])
    assert table.rows == [
        ["p", "text→image, recall@5", "float32", "64", "50.0", "25.0"],
        ["p", "text→image, recall@5", "binary", "2", "40.0", "10.0"],
    ]
    del pool["stored"]
    assert precisions([run]) is None
