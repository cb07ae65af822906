"""Held-out data that the ranks embed in shares come together on every rank, in order."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from stage_trainer.evaluation.retrieval import Pool, embed


class Counting:
    """A model whose towers give an item's number, as bytes or digits, and its square."""

    def encode(self, items, **options):
        numbers = np.array([int(item) for item in items], np.float32)
        return np.stack([numbers, numbers**2], axis=1) if len(items) else np.empty((0, 2), np.float32)

    text = vision = property(lambda self: self)


@pytest.mark.parametrize("images", [1, 5])  # a rank has none, or fewer than the other
def test_rows_of_two_ranks_are_those_of_one(two_ranks, tmp_path, images):
    two_ranks(__file__, tmp_path, str(images))
    texts = sorted(str(n) for n in range(7))
    for rank in (0, 1):
        found = np.load(tmp_path / f"{rank}.npz")
        assert found["images"].tolist() == [[n, n * n] for n in range(images)]
        assert found["texts"].tolist() == [[int(n), int(n) ** 2] for n in texts]


if __name__ == "__main__":
    rank, folder, images = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    pool = Pool("p", [str(n).encode() for n in range(images)], {"en": [(0, str(n)) for n in range(7)]})
    embedded = embed(Counting(), pool, rank=rank, world=2)
    np.savez(folder / f"{rank}.npz", images=embedded.images, texts=embedded.texts)
    dist.destroy_process_group()
