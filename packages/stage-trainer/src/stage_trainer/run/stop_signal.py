"""What the ranks exchange after each step: whether to stop, and which samples were corrupt.

Over gloo, on the host: on GPUs a collective of NCCL's would make every rank wait for its device.
"""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Any

import torch

from stage_trainer.run.rendezvous import LONGEST_WAIT
from stage_trainer.run.stop import launcher_is_gone, when_asked


class StopSignal:
    """Between `with` and its end, SIGTERM, SIGINT (Ctrl-C) and SIGHUP ask for an end after the running step; a second
    SIGINT interrupts at once."""

    def __init__(self) -> None:
        world = torch.distributed.get_world_size()
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT) if world > 1 else None
        self._world = world
        self._asked = False
        self._until_end = contextlib.ExitStack()

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop, or its launcher is gone: `deepspeed` itself ends at once when it is
        signalled, and leaves the ranks running."""
        return self._asked or launcher_is_gone()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank has to call."""
        return bool(self.agree(self.asked)[0])

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
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def __enter__(self) -> StopSignal:
        self._until_end.enter_context(when_asked(self._ask))
        return self

    def __exit__(self, *_: object) -> None:
        self._until_end.close()
