"""The loss of a teacher: plain formulas, and two ranks with one rank's gradients."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from stage_trainer.tasks.distill import teacher_loss

KINDS = ("cosine", "relational")
SHARES = (5, 4)
"""Texts of two ranks."""


def make(width=6, teacher=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(9, width, generator=g), torch.randn(9, teacher, generator=g)


def test_cosine_is_torchs_loss_on_the_first_numbers():
    texts, wanted = make()
    expected = torch.nn.CosineEmbeddingLoss()(texts[:, :4], wanted, torch.ones(9))
    torch.testing.assert_close(teacher_loss(texts, wanted, "cosine"), expected)


@pytest.mark.parametrize("teacher", [4, 11])
def test_relational_is_the_squared_difference_of_all_cosines_of_two(teacher):
    texts, wanted = make(teacher=teacher)
    own, other = texts.clone().requires_grad_(), texts.clone().requires_grad_()
    loss = teacher_loss(own, wanted, "relational")
    cosines = [torch.cosine_similarity(rows[:, None], rows[None], dim=-1) for rows in (other, wanted)]
    plain = (cosines[0] - cosines[1]).square()[~torch.eye(9, dtype=torch.bool)].mean()
    torch.testing.assert_close(loss, plain)
    (found,), (expected,) = torch.autograd.grad(loss, own), torch.autograd.grad(plain, other)
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def found(tmp_path_factory, two_ranks):
    folder = tmp_path_factory.mktemp("distill")
    two_ranks(__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_gradients_of_one_process(found, kind):
    texts, wanted = make()
    texts.requires_grad_()
    loss = teacher_loss(texts, wanted, kind)
    (expected,) = torch.autograd.grad(loss, texts)
    for rank in found:
        torch.testing.assert_close(rank[kind][0], loss.detach())
    # Each rank's is twice its part: gradients are averaged.
    torch.testing.assert_close(torch.cat([rank[kind][1] for rank in found]) / 2, expected)


def one_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    texts, wanted = (rows.split(SHARES)[rank] for rows in make())
    result = {}
    for kind in KINDS:
        own = texts.clone().requires_grad_()
        loss = teacher_loss(own, wanted, kind, dist.group.WORLD)
        result[kind] = loss.detach(), torch.autograd.grad(loss, own)[0]
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), Path(sys.argv[2]))
