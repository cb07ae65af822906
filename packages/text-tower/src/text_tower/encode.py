"""From texts to embeddings in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from text_tower.config import whole_number
from text_tower.packed import PackedTokens
from text_tower.texts import listed

if TYPE_CHECKING:
    from text_tower.tower import TextTower


def encode(
    self: TextTower,
    texts: Iterable[str],
    *,
    task: str | None = None,
    truncate_dim: int | None = None,
    max_length: int = 512,
    batch_size: int = 256,
    batch_tokens: int = 16384,
    normalize: bool = True,
    show_progress: bool = False,
) -> np.ndarray:
    """Embeds texts: float32 `[N, truncate_dim or output_width]`, in the order given.

    Dropout is off and there are no gradients, whatever the tower's mode, which does not change: threads may share a
    tower. Texts run sorted by length, longest first.

    Args:
        texts: a list of strings, or a tuple, a numpy array, a column of a table, an iterator.
        task: None for no instruction and the default adapter; a name selects instruction and adapter, if they exist.
        truncate_dim: keep the first dims only (Matryoshka); done before normalising. None for `config.truncate_dim`.
        max_length: tokens kept of each text, instruction included; never more than `config.max_length`.
        batch_size: most texts in one forward pass.
        batch_tokens: most tokens in one forward pass; a longer text runs alone.
        normalize: scale every row to length 1.
        show_progress: draw a progress bar.

    Raises:
        ValueError: no tokenizer, an unknown task, a number out of range, a bare string, a mapping, set or table, or an
            entry that is no string (its index is named).
    """
    from tqdm.auto import tqdm

    dims = truncate_dim if truncate_dim is not None else self.config.truncate_dim or self.config.output_width
    dims = whole_number("truncate_dim", dims, 1, self.config.output_width)
    batch_size = whole_number("batch_size", batch_size, 1)
    batch_tokens = whole_number("batch_tokens", batch_tokens, 1)
    max_length = whole_number("max_length", max_length, 2)
    ids = _tokenized(self, texts, task, max_length)
    device = next(self.parameters()).device
    adapter = task if task in self.config.adapters else None
    result = np.empty((len(ids), dims), dtype=np.float32)
    progress = tqdm(total=len(ids), desc="embedding", unit="text", disable=not show_progress)
    with torch.inference_mode(), progress:
        for chosen in _batches([len(i) for i in ids], batch_size, batch_tokens):
            packed = PackedTokens.from_lists([ids[i] for i in chosen]).to(device)
            rows = self(packed, adapter=adapter, training=False)[:, :dims]
            result[chosen] = (F.normalize(rows, dim=-1) if normalize else rows).float().cpu().numpy()
            progress.update(len(chosen))
    return result


def _tokenized(tower: TextTower, texts: Iterable[str], task: str | None, max_length: int) -> list[list[int]]:
    config = tower.config
    if tower.tokenizer is None:
        raise ValueError("this tower has no tokenizer; set one: tower.tokenizer = Tokenizer.from_file(path)")
    if task is not None and task not in config.tasks:
        raise ValueError(f"unknown task {task!r}; this tower knows {list(config.tasks) or 'no tasks: leave task out'}")
    instruction = config.instructions.get(task, "") if task else ""
    return tower.tokenizer([instruction + text for text in listed(texts)], min(max_length, config.max_length))


def _batches(lengths: list[int], most_texts: int, most_tokens: int) -> list[list[int]]:
    """Indexes of texts, longest first, in batches within both limits."""
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) == most_texts or tokens + lengths[i] > most_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches
