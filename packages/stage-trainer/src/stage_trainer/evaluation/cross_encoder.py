"""Cross-encoders: models that read two texts together and give a score. No code of a model is run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from stage_trainer import hub
from stage_trainer.errors import UserError
from stage_trainer.evaluation.models import BATCH, Asked, device_of
from stage_trainer.files import fingerprint_of


class CrossEncoder:
    """A cross-encoder of sentence-transformers.

    Args:
        name: a folder, or a name on the hub.
        device: where it computes; None for a GPU if there is one.

    Attributes:
        fingerprint: sha256 of its weights, configuration and tokenizer, by content.

    Raises:
        UserError: there is none, the library is missing or cannot load it, or it gives more than one number.
    """

    def __init__(self, name: str, device: str | None = None):
        if find_spec("sentence_transformers") is None:
            way = "pip install './packages/stage-trainer[models]'"
            raise UserError(f"{name} needs sentence-transformers, which is not installed: {way}")
        import sentence_transformers

        self.name, folder = name, hub.local(name)
        self.fingerprint = fingerprint_of(folder)
        try:
            self.model: Any = sentence_transformers.CrossEncoder(
                str(folder), device=device_of(Asked(device=device)), local_files_only=True
            )
            labels = self.model.num_labels
        except Exception as error:  # whatever another library raises at a folder that it does not take
            first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise UserError(f"sentence-transformers cannot load {folder} as a cross-encoder: {first}") from error
        if labels != 1:
            raise UserError(
                f"{name} gives {labels} numbers for two texts; expected a cross-encoder that gives one score"
            )

    def scores(self, samples: Sequence[Sequence[tuple[str, str]]]) -> np.ndarray:
        """float32 `[n, P]` of n samples of P pairs of texts each: logits, before any sigmoid, which would leave nothing
        of the margin between two that it is sure of.

        Raises:
            UserError: some are not finite, or all are the same though the pairs differ.
        """
        import torch

        pairs = [pair for sample in samples for pair in sample]
        found: np.ndarray = self.model.predict(
            pairs, batch_size=BATCH, activation_fn=torch.nn.Identity(), show_progress_bar=False
        )
        rows = np.asarray(found, dtype=np.float32).reshape(len(samples), -1)
        same = len(set(pairs)) > 1 and float(np.ptp(rows)) == 0.0
        if same or not np.isfinite(rows).all():
            said = "all the same, though the texts differ" if same else "not finite"
            raise UserError(f"{self.name}: its scores of {len(pairs):,} pairs of texts are {said}; was it trained?")
        return rows
