"""No tensor of the size of a logit matrix exists at any time, and what exists together grows with B, not with B * B."""

import pytest
import torch
from contrastive_losses import matryoshka_info_nce, matryoshka_sigmoid, torch_tiles
from contrastive_losses.plain import plain_info_nce
from storages import Memory

WIDTH = 16
OPTIONS = {"temperature": 0.05, "dims": (4, 8, 16)}


def memory_of(loss, rows, **options):
    inputs = [torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    with Memory() as memory:
        copies = [each.clone().requires_grad_() for each in inputs]
        loss(*copies, **OPTIONS, **options).backward()
        del copies
    return memory


@pytest.fixture(autouse=True)
def tiles_that_are_small_beside_the_batch(monkeypatch):
    monkeypatch.setattr(torch_tiles, "CPU_TILE", (64, 64))


CASES = {
    "info_nce": (matryoshka_info_nce, {}),
    "info_nce with a margin": (matryoshka_info_nce, {"false_negative_margin": 0.1}),
    "sigmoid": (matryoshka_sigmoid, {"bias": -1.0}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ids", [False, True])
def test_memory_grows_with_the_batch_and_not_with_its_square(name, ids):
    loss, options = CASES[name]

    def memory(rows):
        given = {"query_ids": torch.arange(rows) // 2, "return_stats": False} if ids else {}
        return memory_of(loss, rows, **options, **given)

    small, large = memory(256), memory(1024)
    assert large.largest < 1024 * 1024 / 4  # bytes: not even a quarter of a B x B mask
    assert large.peak < 4.2 * small.peak
    assert large.peak < 1024 * WIDTH * 4 * 16 + 2**20  # a few times the embeddings, and the tiles


def test_this_measure_sees_the_matrices_of_the_plain_form():
    assert memory_of(plain_info_nce, 512).largest >= 512 * 512 * 4
    assert memory_of(plain_info_nce, 1024).peak > 3.5 * memory_of(plain_info_nce, 512).peak


def test_nothing_is_left_after_the_backward_pass():
    assert memory_of(matryoshka_info_nce, 512).now == 0
