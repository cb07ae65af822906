"""Copies batches to the device, beside what it computes."""

from __future__ import annotations

from typing import TypeVar

import torch

from stage_trainer.batch import Uploadable, tensors_of

Moved = TypeVar("Moved")


class Uploader:
    """Copies parts of batches to a device; to a GPU on a stream of its own, while it computes what came before.

    Args:
        device: where parts go.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)

    def __call__(self, part: Uploadable[Moved]) -> Moved:
        """The part on the device; what is computed from now on waits for it, the host does not."""
        if self._copies is None:
            return part.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            moved = part.to(self.device)
        computing.wait_stream(self._copies)
        for tensor in tensors_of(moved):
            tensor.record_stream(computing)  # its memory is not used again before that stream is done with it
        return moved
