"""Hugging Face data sets, written by the datasets library: folders, parquet, a hub on loopback; captions and texts."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile

import datasets
import pytest
from data_prep.errors import UserError
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Translation, Value
from pyarrow import Table, parquet

CAPTION = "  two  spaces,\ta tab, \u2028 a separator and é (decomposed) \n"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Nothing of the user's cache is read or changed."""
    for name, folder in {"HF_DATASETS_CACHE": "cache", "DOWNLOADED_DATASETS_PATH": "cache/downloads"}.items():
        monkeypatch.setattr(datasets.config, name, str(tmp_path / folder))


def pictures(picture, captions: list, *, column: str = "caption", kind=Value("string"), **more) -> Dataset:  # noqa: B008
    columns = {"image": [{"bytes": picture(n), "path": None} for n in range(len(captions))], column: captions}
    features = {"image": Image(), column: kind, **{name: Value("string") for name in more}}
    return Dataset.from_dict({**columns, **more}, features=Features(features))


def texts(alternatives: list[dict]) -> list[str]:
    return [text["text"] for text in alternatives]


@pytest.mark.parametrize("form", ["saved", "splits", "parquet", "folder"])
def test_images_in_every_form_give_the_same_samples_word_for_word(picture, run, tmp_path, form):
    made, place = pictures(picture, ["a dog", CAPTION, ""]), tmp_path / "data"
    if form == "saved":
        made.save_to_disk(place)
    elif form == "splits":
        DatasetDict({"test": made.select([2]), "train": made}).save_to_disk(place)
    else:
        (place / "data").mkdir(parents=True)
        made.to_parquet(place / "data" / "train-00000-of-00001.parquet")
    given = place / "data" / "train-00000-of-00001.parquet" if form == "parquet" else place
    found = run("hf", data=given, language="en")
    assert [sample.captions for sample in found.samples["image-short"]] == [["a dog"], [CAPTION]]
    assert [sample.image for sample in found.samples["image-short"]] == [picture(0), picture(1)]
    assert found.dropped == {"no caption": 1}
    assert found.samples["image-short"][0].row.languages == ("en",)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (List(Value("string")), ["one", "two"], [("one", "de"), ("two", "de")]),
        ({"en": Value("string"), "fr": Value("string")}, {"en": "a", "fr": "b"}, [("a", "en"), ("b", "fr")]),
        (List({"raw": Value("string"), "lang": Value("string")}), [{"raw": "x", "lang": "it"}], [("x", "it")]),
    ],
)
def test_captions_of_every_shape(picture, run, tmp_path, kind, value, expected):
    pictures(picture, [value], column="captions", kind=kind).save_to_disk(tmp_path / "data")
    (sample,) = run("hf", data=tmp_path / "data", language="de").samples["image-short"]
    assert [(text["text"], text["language"]) for text in sample.content["captions"]] == expected


def test_any_caption_column_is_found_named_or_asked_for(picture, run, tmp_path):
    made = pictures(picture, ["a"], column="beschreibung", image_id=["7"], url=["http://x"], lang=["de"])
    made.save_to_disk(tmp_path / "one")
    (sample,) = run("hf", data=tmp_path / "one").samples["image-short"]
    assert sample.content["captions"][0] == {"text": "a", "language": "de", "origin": "human", "role": "name"}
    two = pictures(picture, ["a"], column="blip", llava=["b"])
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="blip or llava; say --caption-column"):
        run("hf", data=tmp_path / "two", out=tmp_path / "out2")
    found = run("hf", data=tmp_path / "two", out=tmp_path / "out2", caption_column="llava", long_column="blip")
    assert (found.samples["image-short"][0].captions, found.samples["image-long"][0].captions) == (["b"], ["a"])
    with pytest.raises(UserError, match="has no column 'none'; it has image, blip, llava"):
        run("hf", data=tmp_path / "two", out=tmp_path / "out3", caption_column="none")


def test_a_field_of_a_struct_is_a_column(picture, run, tmp_path):
    made = pictures(picture, [{"caption": "in a struct", "n": "1"}], column="json",
                    kind={"caption": Value("string"), "n": Value("string")})  # fmt: skip
    made.save_to_disk(tmp_path / "data")
    found = run("hf", data=tmp_path / "data", caption_column="json.caption")
    assert found.samples["image-short"][0].captions == ["in a struct"]


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_a_value_that_is_no_text_costs_its_row_alone(picture, run, tmp_path, form):
    good = pictures(picture, [f"caption {n}" for n in range(40)])
    table = good.data.table.to_pydict()
    bad = [b"\xff\xfe" if n == 21 else text.encode() for n, text in enumerate(table["caption"])]
    import pyarrow

    strings = pyarrow.array(bad, pyarrow.binary()).view(pyarrow.string())  # as writers do that do not check
    broken = Table.from_arrays([good.data.table["image"].combine_chunks(), strings], schema=good.data.table.schema)
    place = tmp_path / "data"
    if form == "arrow":
        Dataset(broken).save_to_disk(place)
    else:
        place.mkdir()
        parquet.write_table(broken, place / "train.parquet")
    found = run("hf", data=place)
    assert found.receipt["came_in"] == 40
    assert found.receipt["went_out"] == {"image-short": 39}
    (where,) = next(iter(found.receipt["examples"].values()))
    assert "row 22" in where


def test_a_folder_of_image_files_is_read_as_the_library_reads_it(picture, run, tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    lines = []
    for number in range(3):
        (place / f"{number}.jpg").write_bytes(picture(number))
        lines.append({"file_name": f"{number}.jpg", "text": f"photo {number}"})
    (place / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = run("hf", data=place)
    assert [sample.captions for sample in found.samples["image-short"]] == [[f"photo {n}"] for n in range(3)]
    assert [sample.image for sample in found.samples["image-short"]] == [picture(n) for n in range(3)]


@pytest.mark.parametrize("form", ["zip", "tar", "bytes"])
def test_images_in_archives_and_in_columns_of_bytes(picture, run, tmp_path, form):
    place = tmp_path / "photos"
    place.mkdir()
    if form == "zip":
        with zipfile.ZipFile(place / "train.zip", "w") as file:
            file.writestr("0.jpg", picture(0))
            file.writestr("metadata.jsonl", json.dumps({"file_name": "0.jpg", "text": CAPTION}))
    elif form == "tar":
        with tarfile.open(place / "train-0.tar", "w") as tar:
            for name, data in {"0.jpg": picture(0), "0.txt": CAPTION.encode()}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    else:
        table = Table.from_pydict({"jpg": [picture(0)], "txt": [CAPTION], "key": ["0"]})
        parquet.write_table(table, place / "train.parquet")
    (sample,) = run("hf", data=place).samples["image-short"]
    assert (sample.captions, sample.image) == ([CAPTION], picture(0))


def test_an_image_file_outside_the_folder_is_not_read(picture, run, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(picture(1))
    rows = [{"bytes": None, "path": str(tmp_path / "secret.jpg")}, {"bytes": picture(0), "path": None}]
    made = Dataset.from_dict({"image": rows, "caption": ["a", "b"]})
    place = tmp_path / "data"
    place.mkdir()
    parquet.write_table(made.data.table.replace_schema_metadata(None), place / "train.parquet")
    found = run("hf", data=place)
    assert found.dropped == {"image file outside the folder": 1}
    assert found.receipt["went_out"] == {"image-short": 1}


def test_translations_become_pairs_across_languages(run, tmp_path):
    rows = [{"en": "Good day", "de": "Guten Tag"}, {"en": "", "de": "leer"}, {"en": CAPTION, "de": "b"}]
    made = Dataset.from_dict(
        {"translation": rows}, features=Features({"translation": Translation(languages=["de", "en"])})
    )
    made.save_to_disk(tmp_path / "data")
    found = run("hf", data=tmp_path / "data", language="en,de", origin="machine-translation")
    pairs = [(s.content["query"][0], s.content["target"][0]) for s in found.samples["text-pairs"]]
    assert [(q["text"], q["language"], t["text"], t["language"]) for q, t in pairs] == [
        ("Good day", "en", "Guten Tag", "de"),
        (CAPTION, "en", "b", "de"),
    ]
    assert found.dropped == {"empty text": 1}
    assert {text["origin"] for pair in pairs for text in pair} == {"machine-translation"}


def test_of_a_translation_into_several_languages_two_are_chosen(run, tmp_path):
    place = tmp_path / "t.jsonl"
    rows = [
        {"translation": {"language": ["en", "fr", "fr", "zh_CN"], "translation": ["a", "b", "c", "d"]}},
        {"translation": {"en": "a", "zh_CN": "d"}},
    ]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    undecided = run("hf", data=place, out=tmp_path / "undecided")
    assert undecided.dropped == {"translation into several languages: say --language QUERY,TARGET": 1}
    found = run("hf", data=place, language="en,fr")
    (sample,) = found.samples["text-pairs"]
    assert (texts(sample.content["query"]), texts(sample.content["target"])) == (["a"], ["b", "c"])
    assert found.dropped == {"translation without both languages": 1}
    assert run("hf", data=place, language="zh,en", out=tmp_path / "zh").receipt["went_out"] == {"text-pairs": 2}


NEGATIVES = [f"n{number}" for number in range(8)]
PASSAGES = {"is_selected": [0] * 8 + [1], "passage_text": [*NEGATIVES, "yes"]}


@pytest.mark.parametrize(
    ("row", "negatives"),
    [
        ({"query": "q", "passages": PASSAGES, "query_id": 1}, NEGATIVES[:7]),
        ({"query": "q", "docs": [*NEGATIVES, "yes"], "labels": [0] * 8 + [1]}, NEGATIVES[:7]),
        (
            {
                "query_id": "1",
                "query": "q",
                "positive_passages": [{"docid": "9", "title": "", "text": "yes"}],
                "negative_passages": [{"docid": n, "title": "T", "text": n} for n in NEGATIVES],
            },
            [f"T {n}" for n in NEGATIVES[:7]],
        ),
        (
            {"query": "q", "pos": ["yes"], "neg": NEGATIVES, "pos_scores": [9.5], "neg_scores": [9.6, *range(7)]},
            NEGATIVES[1:],
        ),
        (
            {"query": "q", "positive": "yes", "score": [9.5, 9.6, *range(7)]}
            | {f"negative_{number}": text for number, text in enumerate(NEGATIVES, 1)},
            NEGATIVES[1:],
        ),
        ({"query": "q", "positive": "yes", "negative": ["yes", *NEGATIVES[1:]], "score": [-1.0, *range(1, 8)]},
         NEGATIVES[1:]),
    ],
)  # fmt: skip
def test_judged_and_scored_passages_become_triplets_without_false_negatives(run, tmp_path, row, negatives):
    Dataset.from_list([row]).save_to_disk(tmp_path / "data")
    (sample,) = run("hf", data=tmp_path / "data").samples["text-triplets"]
    assert texts(sample.content["target"]) == ["yes"]
    assert [texts(negative) for negative in sample.content["negatives"]] == [[text] for text in negatives]
    joined = {text["origin"] for negative in sample.content["negatives"] for text in negative}
    assert joined == ({"human:joined"} if "title" in json.dumps(row) else {"human"})


def test_a_margin_keeps_only_negatives_that_are_clearly_below(run, tmp_path):
    row = {"query": "q", "pos": ["p"], "neg": NEGATIVES, "pos_scores": [9.0], "neg_scores": [7, *[5] * 7]}
    Dataset.from_list([row]).save_to_disk(tmp_path / "data")
    found = run("hf", data=tmp_path / "data", score_margin=3.0)
    (sample,) = found.samples["text-triplets"]
    assert [texts(negative) for negative in sample.content["negatives"]] == [[text] for text in NEGATIVES[1:]]
    assert sum(found.receipt["notes"].values()) == 1
    assert sample.content["scores"] == [9.0, *[5.0] * 7]


def test_scores_stay_only_where_each_text_has_its_own(run, tmp_path):
    """Of several positives any may be drawn; a margin alone says what the positive is better by."""
    seven = NEGATIVES[1:]
    rows = [
        {"query": "a", "pos": ["p", "r"], "neg": seven, "pos_scores": [9.0, 8.0], "neg_scores": [1.0] * 7},
        {"query": "b", "pos": ["p"], "neg": seven, "pos_scores": [9.0], "neg_scores": [None, *[1.0] * 6]},
        {"query": "c", "pos": ["p"], "neg": seven, "score": [2.0, *[3.0] * 6]},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = run("hf", data=tmp_path / "data.jsonl").samples["text-triplets"]
    assert [sample.content.get("scores") for sample in found] == [None, None, [0.0, -2.0, *[-3.0] * 6]]


@pytest.mark.parametrize(
    "row",
    [
        {"sentence1": "a", "sentence2": "b", "label": 0},
        {"sentence1": "a", "sentence2": "b", "score": 0.2},
        {"sentence1": "a", "sentence2": "b", "label": "neutral"},
        {"query": "a", "pos": ["b"], "label": 0},
        {"query": "a", "positive_passages": [{"text": "b"}], "label": 0},
        {"query": "q", "passages": {"is_selected": [0, 0], "passage_text": ["a", "b"]}},
        {"query": "q", "docs": ["a", "b"], "scores": [9.0, 1.0]},
        {"query": "q", "docs": ["a", "b"], "labels": [1]},
        {"query": "q", "docs": ["a", "b"], "labels": [3, 0]},
        {"query": "q", "positive": "p", "negative": "n", "score": "high"},
        {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1.0], "neg_scores": [1.0, 2.0]},
    ],
)
def test_what_is_not_said_to_match_never_becomes_a_positive(run, tmp_path, row):
    good = ["q", "p"]  # a list, as `import texts` reads it
    place = tmp_path / "t.jsonl"
    place.write_text(json.dumps(row) + "\n" + json.dumps(good) + "\n")
    found = run("hf", data=place)
    assert found.receipt["went_out"] == {"text-pairs": 1}
    assert texts(found.samples["text-pairs"][0].content["query"]) == ["q"]
    assert sum(found.dropped.values()) == 1


def test_grades_are_read_on_their_scale_or_kept_to_evaluate_on(run, tmp_path):
    rows = [
        {"sentence1": "a", "sentence2": text, "score": score} for text, score in (("b", 4.5), ("c", 1.0), ("d", 0.0))
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match="score is 4.5; expected 0 to 1"):
        run("hf", data=tmp_path / "data")
    found = run("hf", data=tmp_path / "data", score_scale=5.0)
    assert [texts(sample.content["target"]) for sample in found.samples["text-pairs"]] == [["b"]]
    assert found.dropped == {"score below --min-score": 2}
    kept = run("hf", data=tmp_path / "data", score_scale=5.0, graded="sts", out=tmp_path / "sts")
    assert [sample.content["score"] for sample in kept.samples["text-pairs"]] == [4.5, 1.0, 0.0]


def test_classes_count_by_their_names_not_by_their_numbers(run, tmp_path):
    names = ["entailment", "neutral", "contradiction"]
    made = Dataset.from_dict(
        {"sentence1": list("abc"), "sentence2": list("xyz"), "label": [0, 1, 2]},
        features=Features(
            {"sentence1": Value("string"), "sentence2": Value("string"), "label": ClassLabel(names=names)}
        ),
    )
    made.save_to_disk(tmp_path / "data")
    found = run("hf", data=tmp_path / "data")
    assert [texts(sample.content["query"]) for sample in found.samples["text-pairs"]] == [["a"]]
    assert sum(found.dropped.values()) == 2


def test_splits_folders_and_formats_that_are_not_there_are_said(picture, run, tmp_path):
    DatasetDict({"dev": pictures(picture, ["a"]), "test": pictures(picture, ["b"])}).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match="has no split 'train'; --split may be dev, test"):
        run("hf", data=tmp_path / "data")
    assert run("hf", data=tmp_path / "data", split="dev").receipt["went_out"] == {"image-short": 1}
    with pytest.raises(UserError, match="no such file or folder, and no name on the hub"):
        run("hf", data=tmp_path / "none")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.csv").write_text("caption\nNA\n")
    with pytest.raises(UserError, match="holds csv files, for `data-prep import texts`"):
        run("hf", data=tmp_path / "tables")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "a.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match="pickles"):
        run("hf", data=tmp_path / "pickles")
    (tmp_path / "data" / "dev" / "data-00000-of-00001.arrow").write_bytes(b"cut")
    with pytest.raises(UserError, match="the datasets library cannot read it"):
        run("hf", data=tmp_path / "data", split="dev", out=tmp_path / "out2")


def test_image_files_on_a_hub_are_downloaded_and_read(picture, hub, say_to_hub, read_back, tmp_path):
    (hub / "0.jpg").write_bytes(picture(0))
    (hub / "metadata.jsonl").write_text(json.dumps({"file_name": "0.jpg", "text": "a file"}))
    done = say_to_hub("hf", "someone/something", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (sample,) = read_back(tmp_path / "out" / "image-short" / "hf")
    assert (sample.captions, sample.image) == (["a file"], picture(0))


def test_ids_in_place_of_texts_are_no_pairs(run, tmp_path):
    Dataset.from_list([{"query_id": 1, "positive_id": 2, "negative_id": 3, "score": 1.5}]).save_to_disk(
        tmp_path / "ids"
    )
    with pytest.raises(UserError, match="ids in place of texts"):
        run("hf", data=tmp_path / "ids")


def test_a_name_on_a_hub_is_downloaded_and_read(picture, hub, say_to_hub, read_back, tmp_path):
    pictures(picture, ["from the hub", CAPTION]).to_parquet(hub / "train-00000-of-00001.parquet")
    done = say_to_hub("hf", "someone/something", "--language", "en", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    found = read_back(tmp_path / "out" / "image-short" / "hf")
    assert [sample.captions for sample in found] == [["from the hub"], [CAPTION]]
    missing = say_to_hub("hf", "someone/nothing", "--out", str(tmp_path / "out2"))
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].startswith("data-prep: someone/nothing: the datasets library cannot read it")
