"""Made evaluation sets in the layouts of their publishers, brought in by `data-prep evalset`."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from data_prep.cli import main as data_prep
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from stage_trainer.evaluation.models import Embedder
from stage_trainer.evaluation.sets import XM3600, XTD10


def jpg(number: int) -> bytes:
    """A picture of its own for each number: 12 x 8 noisy pixels."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (8, 12, 3), np.uint8)
    Pictures.fromarray(pixels).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def evalset(*words: object) -> None:
    more = [] if words[0] in ("beir", "sts") else ["--workers", "1"]
    assert data_prep(["evalset", *map(str, words), *more]) == 0


class Known(Embedder):
    """A model that has a vector for each text and image: `vector(item)` for a text or the bytes of an image."""

    def __init__(self, vector, dims=(8, 4), sees=True, name="known", fingerprint="0" * 64):
        self.vector, self.dims, self.sees, self.name, self.fingerprint = vector, dims, sees, name, fingerprint
        self.settings = {"max_length": "512"}
        self.calls = 0

    def _rows(self, items: Sequence[object]) -> np.ndarray:
        self.calls += 1
        return np.stack([self.vector(item) for item in items]).astype(np.float32)

    def _texts(self, texts, query):
        return self._rows(texts)

    def _images(self, images):
        return self._rows(images)


def random_vector(item: object, width: int = 8) -> np.ndarray:
    """The same for the same item."""
    import hashlib

    seed = int.from_bytes(hashlib.sha256(item if isinstance(item, bytes) else str(item).encode()).digest()[:8])
    return np.random.default_rng(seed).normal(size=width)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Flickr30k, COCO, Crossmodal-3600 and XTD10 in miniature, as their publishers and LAION serve them."""
    root = tmp_path_factory.mktemp("photos")
    names = [f"COCO_val2014_{n:012}.jpg" for n in range(7)]
    for folder, files in {
        "flickr": [f"{n}.jpg" for n in range(6)],
        "val2014": names,
        "xm": [f"{n:016x}.jpg" for n in range(6)],
    }.items():
        (root / folder).mkdir()
        for n, name in enumerate(files):
            (root / folder / name).write_bytes(jpg(n))
    lines = [f"{n}.jpg,Flickr {n}, sentence {k} ." for n in range(6) for k in range(5)]
    (root / "flickr.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    coco = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [
            {"image_id": n, "id": 5 * n + k, "caption": f"COCO {n}, {k}"} for n in range(7) for k in range(5)
        ],
    }
    (root / "coco.json").write_text(json.dumps(coco))
    languages = [*XM3600, "cs", "fil", "quz"]
    lines = [
        json.dumps({
            "image/key": f"{n:016x}", "image/locale": "en",
            **{code: {"caption": [f"{code} {n}", f"{code} {n} again"], "caption/tokenized": []} for code in languages},
        })
        for n in range(6)
    ]  # fmt: skip
    (root / "captions.jsonl").write_text("\n".join(lines))
    (root / "xtd").mkdir()
    (root / "xtd/test_image_names.txt").write_text("\n".join(names))
    for code in (*XTD10, "jp"):
        (root / f"xtd/test_1kcaptions_{code}.txt").write_text("".join(f"{code} coco {n}\n" for n in range(7)))
    out = root / "eval"
    evalset("flickr30k", root / "flickr.txt", root / "flickr", "--out", out)
    evalset("coco", root / "coco.json", root, "--out", out)
    evalset("xm3600", root / "captions.jsonl", root / "xm", "--out", out)
    evalset("xtd10", root / "xtd", root, "--out", out)
    return out


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """Writes a ViDoRe benchmark as `datasets` writes it to the hub, and brings it in under a name."""

    def make(name: str, queries: list[dict], qrels: list[tuple[int, int, int]], count: int = 8) -> Path:
        root = tmp_path_factory.mktemp("vidore")
        form = Features({"corpus-id": Value("int64"), "image": Image()})
        corpus = Dataset.from_dict(
            {"corpus-id": list(range(count)), "image": [{"bytes": jpg(n), "path": None} for n in range(count)]}, form
        )
        corpus.to_parquet(root / "corpus/test-00000-of-00001.parquet")
        Dataset.from_list(queries).to_parquet(root / "queries/test-00000-of-00001.parquet")
        judged = [dict(zip(("query-id", "corpus-id", "score"), row, strict=True)) for row in qrels]
        Dataset.from_list(judged).to_parquet(root / "qrels/test-00000-of-00001.parquet")
        evalset("vidore", root, "--name", name, "--out", root / "eval")
        return root / "eval"

    return make


@pytest.fixture(scope="session")
def export(tmp_path_factory) -> Path:
    """A small model of two towers, whose tokenizer tells the made captions apart."""
    from sentencepiece import SentencePieceTrainer
    from stage_trainer.dual_encoder import DualEncoder
    from text_tower import TextTower, TextTowerConfig, Tokenizer
    from vision_tower import VisionTower, VisionTowerConfig

    root = tmp_path_factory.mktemp("models")
    SentencePieceTrainer.train(
        sentence_iterator=iter([f"Flickr {n}, sentence {n} . COCO {n}, {n} again query title text" for n in range(10)]),
        model_prefix=str(root / "small"), vocab_size=60, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(root / "small.model")
    torch.manual_seed(0)
    text = TextTowerConfig(vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, mlp_width=32,
                           instructions={"query": "text "})  # fmt: skip
    vision = VisionTowerConfig(resolution=16, patch=8, width=16, layers=1, heads=2, mlp_width=24)
    model = DualEncoder(TextTower(text, tokenizer), VisionTower(vision), matryoshka_dims=(16, 8))
    model.save_pretrained(root / "small")
    return root / "small"
