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
    batch_size: int = 64,
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
        batch_size: texts in one forward pass.
        normalize: scale every row to length 1.
        show_progress: draw a progress bar.

    Raises:
        ValueError: no tokenizer, an unknown task, a bare string, something that is no string, or a dim out of range.
    """
    config = tower.config
    if tower.tokenizer is None:
        raise ValueError("this tower has no tokenizer; set one: tower.tokenizer = Tokenizer.from_file(path)")
    if isinstance(texts, str):
        raise ValueError("texts is a single string; expected a list of strings: encode([text])")
    if task is not None and task not in config.tasks:
        raise ValueError(f"unknown task {task!r}; this tower knows {list(config.tasks) or 'no tasks: leave task out'}")
    if truncate_dim is not None and not 1 <= truncate_dim <= config.width:
        raise ValueError(f"truncate_dim is {truncate_dim}; expected 1 to {config.width}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    texts = list(texts)
    instruction = config.instructions.get(task, "") if task else ""
    if instruction:
        texts = [instruction + text if isinstance(text, str) else text for text in texts]
    ids = tower.tokenizer(texts, max_length=min(max_length, config.max_length))
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    starts = range(0, len(order), batch_size)
    if show_progress:
        from tqdm.auto import tqdm

        starts = tqdm(starts, desc="embedding texts", unit="batch")

    device = next(tower.parameters()).device
    adapter = task if task in config.adapters else None
    result = np.empty((len(ids), truncate_dim or config.width), dtype=np.float32)
    training = tower.training
    tower.eval()
    try:
        with torch.inference_mode():
            for start in starts:
                chosen = order[start : start + batch_size]
                packed = PackedTokens.from_lists([ids[i] for i in chosen]).to(device)
                rows = tower(packed, adapter=adapter)[:, :truncate_dim]
                result[chosen] = (F.normalize(rows, dim=-1) if normalize else rows).float().cpu().numpy()
    finally:
        tower.train(training)
    return result
