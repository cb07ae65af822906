"""ShareGPT4V and Karpathy's splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def images(tmp_path, picture) -> Path:
    (tmp_path / "coco/train2017").mkdir(parents=True)
    (tmp_path / "val2014").mkdir()
    for number in range(3):
        (tmp_path / f"coco/train2017/{number}.jpg").write_bytes(picture(number))
        (tmp_path / f"val2014/COCO_val2014_{number}.jpg").write_bytes(picture(number))
    return tmp_path


def test_sharegpt4v_takes_the_first_answer_as_the_long_caption(images, run):
    def talk(*turns: tuple[str, object], **fields: object) -> dict:
        return {
            "id": "0",
            "image": "coco/train2017/0.jpg",
            "conversations": [{"from": who, "value": what} for who, what in turns],
            **fields,
        }

    rows = [
        talk(("human", "Describe.\n<image>"), ("gpt", "A long story. "), ("human", "More?"), ("gpt", "No.")),
        talk(("human", "<image>")),
        talk(("human", "text only"), ("gpt", "x"), image=None),
        talk(("human", "<image>"), ("gpt", "outside"), image="../../x.jpg"),
        talk(("human", "<image>"), ("gpt", 3)),
        talk(("human", "<image>"), ("gpt", "gone"), image="coco/train2017/9.jpg"),
    ]
    path = images / "sharegpt4v.json"
    path.write_text(json.dumps(rows))
    found = run("sharegpt4v", conversations=path, images=images)
    (sample,) = found.samples["image-long"]
    assert sample.content["captions"] == [
        {"text": "A long story.", "language": "en", "origin": "synthetic:sharegpt4v", "role": "long"}
    ]
    assert found.dropped == {
        "conversation without an image": 1,
        "file name outside the folder": 1,
        "no caption": 2,
        "no such image file": 1,
    }


def test_karpathys_splits_are_kept_apart(images, run):
    def image(number: int, split: str, **fields: object) -> dict:
        sentences = [
            {"raw": f"Sentence {n} of {number}. ", "tokens": ["s"], "imgid": number, "sentid": n} for n in (1, 2)
        ]
        return {
            "filepath": "val2014",
            "sentids": [1, 2],
            "filename": f"COCO_val2014_{number}.jpg",
            "imgid": number,
            "split": split,
            "sentences": sentences,
            "cocoid": 100 + number,
            **fields,
        }

    rows = [
        image(0, "train"),
        image(1, "test"),
        image(2, "restval"),
        image(1, "train", sentences=[]),
        image(1, "train", filename=None),
    ]
    path = images / "dataset_coco.json"
    path.write_text(json.dumps({"images": rows, "dataset": "coco"}))
    found = run("karpathy", dataset=path, images=images)
    assert [sample.captions for sample in found.samples["image-short"]] == [
        ["Sentence 1 of 0.", "Sentence 2 of 0."],
        ["Sentence 1 of 2.", "Sentence 2 of 2."],
    ]
    assert [sample.content["item"] for sample in found.samples["image-short"]] == ["karpathy/100", "karpathy/102"]
    assert found.dropped == {"no caption": 1, "no image name, or one outside the folder": 1, "of another split": 1}


def test_flickr_has_no_folders(images, run, picture):
    (images / "1000.jpg").write_bytes(picture())
    row = {
        "sentids": [0],
        "imgid": 0,
        "sentences": [{"raw": "Two men.", "tokens": [], "imgid": 0, "sentid": 0}],
        "split": "test",
        "filename": "1000.jpg",
    }
    path = images / "dataset_flickr30k.json"
    path.write_text(json.dumps({"images": [row], "dataset": "flickr30k"}))
    found = run("karpathy", dataset=path, images=images, splits="test")
    assert found.samples["image-short"][0].captions == ["Two men."]
