"""From texts to embeddings in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from text_tower.packed import PackedTokens

if TYPE_CHECKING:
    from text_tower.tower import TextTower


def encode(
    tower: TextTower,
    texts: Sequence[str],
    *,
    task: str | None = None,
    truncate_dim: int | None = None,
    max_length: int = 512,
    batch_size: int = 256,
    batch_tokens: int = 16384,
    normalize: bool = True,
    show_progress: bool = False,
) -> np.ndarray:
    """Embeds texts: float32 `[N, truncate_dim or width]`, in the order given.

    Dropout is off and no gradient is kept; the tower's mode is left as it was. Texts run sorted by length, longest
    first.

    Args:
        texts: a list of strings; an empty string is a text too.
        task: None for no instruction and the default adapter; a name selects instruction and adapter, where they exist.
        truncate_dim: keep the first dims only (Matryoshka); done before normalising.
        max_length: tokens kept of each text, instruction included; never more than `config.max_length`.
        batch_size: most texts in one forward pass.
        batch_tokens: most tokens in one forward pass; a longer text has one to itself.
        normalize: scale every row to length 1.
        show_progress: draw a progress bar.

    Raises:
        ValueError: no tokenizer, an unknown task, a bare string, something that is no string, or a dim out of range.
    """
    from tqdm.auto import tqdm

    config = tower.config
    if tower.tokenizer is None:
        raise ValueError("this tower has no tokenizer; set one: tower.tokenizer = Tokenizer.from_file(path)")
    if isinstance(texts, str):
        raise ValueError("texts is a single string; expected a list of strings: encode([text])")
    if task is not None and task not in config.tasks:
        raise ValueError(f"unknown task {task!r}; this tower knows {list(config.tasks) or 'no tasks: leave task out'}")
    if truncate_dim is not None and not 1 <= truncate_dim <= config.width:
        raise ValueError(f"truncate_dim is {truncate_dim}; expected 1 to {config.width}")
    for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    texts = list(texts)
    instruction = config.instructions.get(task, "") if task else ""
    if instruction:
        texts = [instruction + text if isinstance(text, str) else text for text in texts]
    ids = tower.tokenizer(texts, max_length=min(max_length, config.max_length))
    batches = _batches([len(i) for i in ids], batch_size, batch_tokens)
    device = next(tower.parameters()).device
    adapter = task if task in config.adapters else None
    result = np.empty((len(ids), truncate_dim or config.width), dtype=np.float32)
    training = tower.training
    tower.eval()
    progress = tqdm(total=len(ids), desc="embedding", unit="text", disable=not show_progress)
    try:
        with torch.inference_mode(), progress:
            for chosen in batches:
                packed = PackedTokens.from_lists([ids[i] for i in chosen]).to(device)
                rows = tower(packed, adapter=adapter)[:, :truncate_dim]
                result[chosen] = (F.normalize(rows, dim=-1) if normalize else rows).float().cpu().numpy()
                progress.update(len(chosen))
    finally:
        tower.train(training)
    return result


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
