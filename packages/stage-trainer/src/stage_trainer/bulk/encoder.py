"""One process's share of a job: texts and images of a part to vectors, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_prep.shards import Dataset, ShardError

from stage_trainer.bulk.entries import Entry, Sample, name_of
from stage_trainer.bulk.parts import LeftOut, Part
from stage_trainer.data.samples import image_of
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.encoding.encode import Encoded
from stage_trainer.errors import UserError


@dataclass(frozen=True)
class EncoderSettings:
    """The model's directory, how it encodes, and how the vectors are stored.

    Args:
        options: of `DualEncoder.encode`.
        precision: of the file; parts are float32 always.
        calibration: a file of vectors whose ranges int8 and uint8 get; None for those of the vectors themselves.
    """

    model: Path
    options: dict[str, Any]
    precision: str = "float32"
    calibration: Path | None = None


class Encoder:
    """A model on a device.

    Raises:
        UserError: the model cannot be read, or the options do not fit it.
    """

    def __init__(self, settings: EncoderSettings, device: str):
        self.model = DualEncoder.from_pretrained(settings.model).eval().to(device)
        self.options = settings.options
        try:
            # Of nothing it checks the options, whether the dims fill bytes among them.
            self.model.encode([], **self.options, precision=settings.precision)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.data: dict[str, Dataset] = {}

    def part(self, entries: Sequence[Entry]) -> Part:
        """The vectors of the entries that can be encoded, and what is wrong with the others.

        Raises:
            UserError: the GPU's memory is too small.
        """
        left_out: dict[int, str] = {}
        inputs: list[tuple[int, dict[str, Any]]] = []
        for place, entry in enumerate(entries):
            try:
                inputs.append((place, {entry.kind: self._value(entry)}))
            except ShardError as error:
                left_out[place] = str(error)
        try:
            found = self.model.encode([value for _, value in inputs], errors="skip", **self.options)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory is too small ({str(error).partition('.')[0]}); lower --batch-size. What is done "
                "stays"
            ) from error
        assert isinstance(found, Encoded)
        left_out |= {inputs[each.place][0]: each.reason for each in found.skipped}
        kept = [entries[inputs[place][0]].id for place in found.kept]
        listed = [LeftOut(n, entries[n].id, name_of(entries[n]), why) for n, why in sorted(left_out.items())]
        return Part(np.asarray(found.embeddings), kept, listed)

    def _value(self, entry: Entry) -> Any:
        if entry.value is None:
            raise ShardError(entry.fault)
        return self._read(entry.value) if isinstance(entry.value, Sample) else entry.value

    def _read(self, sample: Sample) -> bytes:
        if sample.directory not in self.data:
            self.data[sample.directory] = Dataset.open(sample.directory)
        data = self.data[sample.directory]
        image = image_of(data.read(sample.number))
        if image is None:
            raise ShardError(f"{data.directory}: sample {data.row(sample.number).key} has no image")
        return image
