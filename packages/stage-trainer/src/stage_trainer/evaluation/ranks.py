"""Held-out data in parts: which samples a rank reads and embeds, and how all parts come together on every rank.

They travel as tensors of numbers and of bytes, not as objects, which would be pickled on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage_trainer.errors import UserError


def part_of(total: int, rank: int, world: int) -> range:
    """The samples of a rank: neighbours, so that it opens the files that hold them alone."""
    return range(total * rank // world, total * (rank + 1) // world)


def rows_together(own: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The rows `[N, D]` of all ranks, rank after rank; every rank has to call.

    Args:
        own: this rank's, `[n, D]`.
        sizes: how many each rank has.
    """
    if len(sizes) == 1:
        return own
    padded = torch.zeros((max(sizes), own.shape[1]))
    padded[: len(own)] = torch.from_numpy(own)
    found = _gathered(padded, len(sizes))
    rows: np.ndarray = torch.cat([each[:size] for each, size in zip(found, sizes, strict=True)]).numpy()
    return rows


def content_together(own: object, refusal: Exception | None, world: int) -> list[Any]:
    """What each rank has read, as JSON holds it; every rank has to call.

    Args:
        refusal: why this rank could not read its part.

    Raises:
        UserError: on all ranks, if one could not: the first one's reason.
    """
    content = json.dumps({"read": own, "refused": None if refusal is None else str(refusal)}).encode()
    lengths = [int(each) for each in _gathered(torch.tensor([len(content)]), world)]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    found = _gathered(padded, world)
    parts = [json.loads(each[:size].numpy().tobytes()) for each, size in zip(found, lengths, strict=True)]
    if refused := [part["refused"] for part in parts if part["refused"] is not None]:
        raise UserError(refused[0]) from refusal
    return [part["read"] for part in parts]


def _gathered(own: Tensor, world: int) -> list[Tensor]:
    """The tensors of all ranks, of one shape, on the CPU."""
    sent = own.cuda() if torch.distributed.get_backend() == "nccl" else own
    found = [torch.empty_like(sent) for _ in range(world)]
    torch.distributed.all_gather(found, sent)
    return [each.cpu() for each in found]
