import sys
from pathlib import Path

import forks
import pytest
import torch
import torch.nn.functional as F

WORKER = Path(__file__).with_name("rank_worker.py")


def _oracle(
    queries,
    targets,
    *,
    temperature,
    negatives=None,
    dims=None,
    weights=None,
    query_ids=None,
    target_ids=None,
    sample_weights=None,
):
    """The same loss by another road: cross entropies over explicit columns, and masks written pair by pair."""
    size, width = queries.shape
    dims = [width] if dims is None else dims
    weights = [1.0] * len(dims) if weights is None else weights
    sample_weights = torch.ones(size, dtype=queries.dtype) if sample_weights is None else sample_weights
    hidden = torch.zeros(size, size, dtype=torch.bool)
    for ids in (query_ids, target_ids):
        for i in range(size):
            for j in range(size):
                if ids is not None and i != j and ids[i] == ids[j]:
                    hidden[i, j] = True
    total = 0.0
    for dim, weight in zip(dims, weights, strict=True):
        unit_queries = F.normalize(queries[:, :dim], dim=-1)
        in_batch = (unit_queries @ F.normalize(targets[:, :dim], dim=-1).T / temperature).masked_fill(
            hidden, -torch.inf
        )
        columns = in_batch
        if negatives is not None:
            hard = F.normalize(negatives.reshape(-1, width)[:, :dim], dim=-1)
            columns = torch.cat([in_batch, unit_queries @ hard.T / temperature], dim=1)
        answer = torch.arange(size)
        both = F.cross_entropy(columns, answer, reduction="none")
        both = both + F.cross_entropy(in_batch.T, answer, reduction="none")
        total = total + weight * (sample_weights * both).sum() / sample_weights.sum()
    return total


@pytest.fixture(scope="session")
def oracle():
    return _oracle


@pytest.fixture(scope="session")
def make_batch():
    """(queries, targets[, negatives]) of a seed, unnormalised, requiring gradients."""

    def make(rows, width=8, hard=0, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(rows, width), (rows, width)] + ([(rows, hard, width)] if hard else [])
        tensors = [3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        return [tensor.requires_grad_() for tensor in tensors]

    return make


@pytest.fixture(scope="session")
def run_on_ranks(tmp_path_factory):
    """Starts four gloo processes, which compute every case in groups of 1, 2 and 4; returns what each wrote."""

    def run(cases):
        folder = tmp_path_factory.mktemp("ranks")
        torch.save(cases, folder / "cases.pt")
        ranks = [[sys.executable, str(WORKER), str(rank), str(folder)] for rank in range(4)]
        done = forks.together(ranks, folder, [{"GLOO_SOCKET_IFNAME": "lo"}] * 4)
        assert done.returncode == 0, done.stdout + done.stderr
        return [torch.load(folder / f"rank{rank}.pt") for rank in range(4)]

    return run
