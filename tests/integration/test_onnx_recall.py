"""A trained model finds as much in onnxruntime, in fewer bits too."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from stage_trainer.cli import main
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.evaluation.retrieval import EmbeddedPool, Pool, embed, score
from stage_trainer.formats.onnx.graphs import TEXT, VISION


def embed_by_graphs(model: DualEncoder, folder: Path, bits: str, pool: Pool) -> EmbeddedPool:
    """The pool's vectors from an export's graphs, in batches; inputs are made by the model."""
    text, vision = (onnxruntime.InferenceSession(folder / f"onnx/{name}{bits}.onnx") for name in (TEXT, VISION))
    texts = pool.all_texts()
    tokens, pixels = model.text.tokenizer(texts, max_length=512), map(model.vision.preprocess, pool.images)
    rows = []
    for batch in batched(tokens, 64):
        longest = max(map(len, batch))
        ids = np.array([row + [1] * (longest - len(row)) for row in batch])
        rows.append(text.run(None, {"input_ids": ids})[0])
    images = [
        vision.run(None, {"pixel_values": model.vision.normalize(torch.stack(batch)).numpy()})[0]
        for batch in batched(pixels, 64)
    ]
    return EmbeddedPool(np.concatenate(images), np.concatenate(rows), row={each: i for i, each in enumerate(texts)})


def batched(items, size: int):
    items = list(items)
    return [items[first : first + size] for first in range(0, len(items), size)]


def recalls(pool: Pool, embedded: EmbeddedPool, dims: list[int]) -> dict[str, float]:
    """Recall@5 in percent of each direction, its mean over languages and dims."""
    found, _ = score(pool, embedded, dims)
    return {way: 100 * float(np.mean([by_dim[str(dim)]["mean"] for dim in dims])) for way, by_dim in found.items()}


@pytest.mark.full
def test_recall_stays_within_half_a_point_in_float16_and_two_in_int8(train, drawn_corpus, tmp_path):
    train(1, "steps=200")
    out = tmp_path / "model"
    assert main(["export", str(tmp_path / "run/stage1"), str(out), "--format", "onnx"]) == 0
    model = DualEncoder.from_pretrained(next((tmp_path / "run/stage1").glob("step-*/model")))
    compare(model, out, sorted(drawn_corpus.glob("validation/image-*/*")))


def compare(model: DualEncoder, out: Path, pools: list[Path]) -> None:
    assert pools
    dims = [*(model.matryoshka_dims or (model.text.config.width,))]
    for pool in map(Pool.open, pools):
        wanted = recalls(pool, embed(model, pool), dims)
        assert max(wanted.values()) > 20, "it learned too little to lose anything"
        for bits, points in {"": 0.1, "_fp16": 0.5, "_int8": 2.0, "_q4": 5.0}.items():
            found = recalls(pool, embed_by_graphs(model, out, bits, pool), dims)
            print(pool.name, bits or "float32", {way: f"{wanted[way]:.2f} {found[way]:.2f}" for way in wanted})
            assert max(abs(found[way] - wanted[way]) for way in wanted) <= points, (pool.name, bits, wanted, found)


if __name__ == "__main__":  # MODEL ITS-ONNX-EXPORT POOL …
    compare(DualEncoder.from_pretrained(sys.argv[1]), Path(sys.argv[2]), list(map(Path, sys.argv[3:])))
