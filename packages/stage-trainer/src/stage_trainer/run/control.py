"""What the ranks tell one another after each step: shall we stop, were there corrupt samples.

Over gloo, on the host: on GPUs a collective of NCCL's would make every rank wait for its device.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch


class Control:
    """Between `with` and its end, SIGTERM and SIGINT (Ctrl-C) ask for an end after the running step; a second SIGINT
    interrupts at once.

    Attributes:
        asked: whether this process was asked to stop.
    """

    def __init__(self) -> None:
        world = torch.distributed.get_world_size()
        self._group: Any = torch.distributed.new_group(backend="gloo") if world > 1 else None
        self._world = world
        self._former: dict[int, Any] = {}
        self.asked = False

    def agree(self, *numbers: int) -> list[int]:
        """The sums over all ranks; every rank has to call."""
        if self._group is None:
            return list(numbers)
        message = torch.tensor(numbers, dtype=torch.int64)
        torch.distributed.all_reduce(message, group=self._group)
        return message.tolist()

    def gather(self, mine: list[Any]) -> list[Any]:
        """The lists of all ranks, one after another; every rank has to call."""
        if self._group is None:
            return mine
        found: list[Any] = [None] * self._world
        torch.distributed.all_gather_object(found, mine, group=self._group)
        return [entry for entries in found for entry in entries]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Control:
        self._former = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
