"""Hard-negative images beside a caption's own, out of tables and out of data sets of Hugging Face's kind."""

from __future__ import annotations

import csv
import json
import tarfile

import datasets
import pytest
import webdataset
from data_prep.cli import main
from data_prep.errors import UserError
from data_prep.shards import Dataset, DatasetWriter, ShardError, Unusable, content_of
from datasets import Features, Image, List, Value

from .conftest import read_back

CAPTIONS = json.dumps({"captions": [{"text": "a", "language": "en"}]}).encode()


@pytest.fixture
def folder(tmp_path, picture):
    root = tmp_path / "pages"
    root.mkdir()
    for number in range(14):
        (root / f"{number}.jpg").write_bytes(picture(number))
    (root / "broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture
def lines(folder):
    def write(*rows: dict) -> None:
        (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


def test_a_list_of_names_gives_triplets_in_its_order_and_too_short_a_list_a_pair(folder, lines, run, picture):
    lines(
        {"query": "one", "image": "0.jpg", "negatives": ["3.jpg", "1.jpg", "2.jpg"], "long_caption": "a page"},
        {"query": "two", "image": "1.jpg", "negatives": ["2.jpg"]},
        {"query": "three", "image": "2.jpg", "negatives": None},
        {"query": "four", "image": "3.jpg"},
        {"query": "five", "image": "4.jpg", "negatives": ["../3.jpg", 7]},
    )
    found = run("images", folder=folder, caption_column="query", negatives=2, language="en")
    (triplet,) = found.samples["image-triplets"]
    assert (triplet.image, triplet.negatives) == (picture(0), [picture(3), picture(1)])
    assert triplet.captions == ["one", "a page"]
    assert [sample.captions for sample in found.samples["image-short"]] == [["two"], ["three"], ["four"], ["five"]]
    assert found.receipt["notes"] == {
        "with fewer than 2 negative images (--negatives), as pairs": 2,
        "negative images left out: no file name, or one outside the folder": 2,
    }


def test_eleven_and_more_stand_in_the_order_of_their_numbers(folder, lines, run, picture):
    lines({"caption": "one", "image": "0.jpg", "negative": [f"{n}.jpg" for n in range(1, 13)]})
    (triplet,) = run("images", folder=folder, negatives=12).samples["image-triplets"]
    assert triplet.negatives == [picture(n) for n in range(1, 13)]


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (["neg_image", "negative_2"], {}),
        (["Negative_1", "negative_2"], {}),
        (["neg_image_path", "hard_negative"], {}),
        (["second", "third"], {"negative_columns": "second,third"}),
    ],
)
def test_columns_of_names_are_known_or_named(folder, run, picture, columns, options):
    with (folder / "t.csv").open("w", newline="") as file:
        rows = [["file", "caption", *columns], ["0.jpg", "one", "1.jpg", "2.jpg"], ["1.jpg", "two", "", "0.jpg"]]
        csv.writer(file).writerows(rows)
    found = run("images", folder=folder, negatives=2, **options)
    (triplet,) = found.samples["image-triplets"]
    assert triplet.negatives == [picture(1), picture(2)]
    assert len(found.samples["image-short"]) == 1


def test_negatives_that_are_none_are_left_out_and_counted(folder, lines, run, picture):
    lines(
        {
            "caption": "one", "image": "0.jpg",
            "negatives": ["0.jpg", "1.jpg", "1.jpg", "gone.jpg", "broken.jpg", "../x.jpg", 7, "2.jpg"],
        }
    )  # fmt: skip
    found = run("images", folder=folder, negatives=2)
    (triplet,) = found.samples["image-triplets"]
    assert triplet.negatives == [picture(1), picture(2)]
    assert found.receipt["notes"] == {
        "negative images left out: equal to the positive, or there twice": 2,
        "negative images left out: no such image file": 1,
        "negative images left out: not an image": 1,
        "negative images left out: no file name, or one outside the folder": 2,
    }


def test_no_held_out_image_is_a_negative_of_training(folder, lines, tmp_path):
    names = [f"{n}.jpg" for n in range(14)]
    lines(*({"caption": name, "image": name, "negatives": [n for n in names if n != name]} for name in names))
    options = ["--held-out", "0.4", "--negatives", "1", "--workers", "1", "--name", "mine"]
    assert main(["import", "images", str(folder), "--out", str(tmp_path / "out"), *options]) == 0
    sides = []
    for split in ("train", "validation"):
        data = Dataset.open(tmp_path / "out" / split / "image-triplets/mine")
        members = [data.read(n) for n in range(len(data))]
        sides.append({of["jpg"] for of in members})
        assert {of["negative-0.jpg"] for of in members} <= sides[-1]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"negatives": 0}, "--negatives 0: expected at least 1"), ({"negative_columns": "no"}, "has no column no")],
)
def test_what_cannot_be_meant_is_refused(folder, run, options, complaint):
    (folder / "t.csv").write_text("file,caption\n0.jpg,one\n")
    with pytest.raises(UserError, match=complaint):
        run("images", folder=folder, **options)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("form", ["saved", "parquet", "bytes"])
def test_columns_of_images_and_lists_of_them_are_read_from_hugging_faces_data(run, picture, tmp_path, form, several):
    """A list, or columns of their own; the rows' own image is told from them without being named."""

    def image(n):
        return picture(n) if form == "bytes" else {"bytes": picture(n), "path": None}

    kind = Value("binary") if form == "bytes" else Image()
    columns = {"query": ["one", "two"], "image": [image(0), image(1)]}
    features = {"query": Value("string"), "image": kind}
    if several:
        columns |= {"negative_1": [image(2), image(3)], "negative_2": [image(4), None]}
        features |= {"negative_1": kind, "negative_2": kind}
    else:
        columns |= {"negatives": [[image(2), image(4)], [image(3)]]}
        features |= {"negatives": List(kind)}
    made = datasets.Dataset.from_dict(columns, features=Features(features))
    made.save_to_disk(tmp_path / "data") if form == "saved" else made.to_parquet(tmp_path / "data.parquet")
    place = tmp_path / ("data" if form == "saved" else "data.parquet")
    found = run("hf", data=place, negatives=2, language="en")
    (triplet,) = found.samples["image-triplets"]
    assert (triplet.captions, triplet.image) == (["one"], picture(0))
    assert triplet.negatives == [picture(2), picture(4)]
    assert found.samples["image-short"][0].captions == ["two"]


def test_a_second_column_of_bytes_is_none_of_negatives(run, picture, tmp_path):
    columns = {"caption": ["one"], "image": [picture(0)], "image_2": [picture(1)], "negatively": [picture(2)]}
    features = Features({name: Value("string" if name == "caption" else "binary") for name in columns})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data.parquet")
    found = run("hf", data=tmp_path / "data.parquet", language="en")
    assert [sample.image for sample in found.samples["image-short"]] == [picture(0)]


def test_ids_in_the_place_of_images_are_refused_where_they_are_named(run, picture, tmp_path):
    columns = {"query": ["one"], "image": [{"bytes": picture(0), "path": None}], "negatives": [["id7", "id8"]]}
    features = Features({"query": Value("string"), "image": Image(), "negatives": List(Value("string"))})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(UserError, match="'negatives' holds texts.*put the images of those rows in their place"):
        run("hf", data=tmp_path / "data.parquet", caption_column="query", negative_columns="negatives")


def test_any_reader_of_webdataset_finds_the_negatives_of_a_sample(folder, lines, run, picture, tmp_path):
    lines({"caption": "one", "image": "0.jpg", "negatives": ["1.jpg", "2.jpg"]})
    run("images", folder=folder, negatives=2)
    (tar,) = (tmp_path / "out/image-triplets/images").glob("*.tar")
    with tarfile.open(tar) as file:
        assert [name.partition(".")[2] for name in file.getnames()] == [
            "jpg", "negative-0.jpg", "negative-1.jpg", "json",
        ]  # fmt: skip
    (sample,) = webdataset.WebDataset(str(tar), shardshuffle=False)
    assert (sample["jpg"], sample["negative-0.jpg"], sample["negative-1.jpg"]) == tuple(map(picture, range(3)))
    (decoded,) = webdataset.WebDataset(str(tar), shardshuffle=False).decode("rgb8")
    assert decoded["negative-1.jpg"].shape == (48, 64, 3)


@pytest.mark.parametrize(
    "members",
    [["jpg"], ["jpg", "negative-1.jpg"], ["jpg", "negative-0.jpg", "negative-2.jpg"], ["negative-0.jpg"],
     ["jpg", "negative-0.jpg", "negative-0.png"], ["jpg", "negative-00.jpg"], ["jpg", "negative-0.gif"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_no_triplet_is_neither_written_nor_read(members, picture, tmp_path):
    sample = {name: picture() for name in members} | {"json": CAPTIONS}
    with (
        pytest.raises(ShardError, match="of image-triplets has the members.*and negative-0.jpg, negative-1.jpg, …"),
        DatasetWriter(tmp_path / "made", kind="image-triplets", source="made") as writer,
    ):
        writer.write("s0", sample, languages=["en"], tokens=None)
    with pytest.raises(Unusable, match="no negative images|no image"):
        content_of("image-triplets", sample)


def test_other_kinds_have_no_place_for_negatives(picture, tmp_path):
    sample = {"jpg": picture(), "negative-0.jpg": picture(1), "json": CAPTIONS}
    with (
        pytest.raises(ShardError, match="of image-short has the members"),
        DatasetWriter(tmp_path / "made", kind="image-short", source="made") as writer,
    ):
        writer.write("s0", sample, languages=["en"], tokens=None)


def test_a_negative_that_cannot_be_decoded_is_named_by_validate(picture, tmp_path, capsys):
    with DatasetWriter(tmp_path / "made", kind="image-triplets", source="made") as writer:
        for number in range(2):
            content = json.loads(CAPTIONS) | {"source": "made", "item": f"made/{number}"}
            content["captions"][0] |= {"origin": "human", "role": "name"}
            broken = picture(1) if number else picture(1)[:200]
            sample = {"jpg": picture(), "negative-0.jpg": broken, "json": json.dumps(content).encode()}
            writer.write(f"s{number}", sample, languages=["en"], tokens=None)
    assert main(["validate", str(tmp_path / "made")]) == 1
    said = capsys.readouterr()
    assert "sample 's0': its .negative-0.jpg cannot be decoded" in said.out + said.err
    assert "'s1'" not in said.out + said.err


def test_duplicates_of_triplets_are_not_put_together(picture, tmp_path, capsys):
    with DatasetWriter(tmp_path / "made", kind="image-triplets", source="made") as writer:
        sample = {"jpg": picture(), "negative-0.jpg": picture(1), "json": CAPTIONS}
        writer.write("s0", sample, languages=["en"], tokens=None)
    assert main(["dedup", str(tmp_path / "made"), "--name", "x", "--out", str(tmp_path / "out")]) == 2
    assert "captions of equal images cannot be put together" in capsys.readouterr().err


def test_curation_keeps_the_negatives_of_what_stays(folder, lines, run, picture, tmp_path):
    lines({"caption": "where the station of the town is", "image": "0.jpg", "negatives": ["1.jpg", "2.jpg"]})
    run("images", folder=folder, negatives=2, language="en")
    made = tmp_path / "out/image-triplets/images"
    options = ["--name", "known", "--out", str(tmp_path / "known"), "--workers", "1"]
    assert main(["languages", str(made), *options]) == 0
    (after,) = read_back(tmp_path / "known/image-triplets/known")
    assert (after.image, after.negatives) == (picture(0), [picture(1), picture(2)])
