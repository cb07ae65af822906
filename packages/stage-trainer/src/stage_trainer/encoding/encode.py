"""A list of texts and images to rows, in the order of the list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stage_trainer.encoding.inputs import Picture, Skipped, is_single, opened, told_apart
from stage_trainer.encoding.options import EncodeOptions
from stage_trainer.errors import UserError

if TYPE_CHECKING:
    from text_tower import TextTower
    from vision_tower import VisionTower

Rows = np.ndarray | Tensor | list[Tensor]


class Encoded(NamedTuple):
    """What `encode(…, errors="skip")` returns.

    Attributes:
        embeddings: rows of what could be used, in the order of the list.
        kept: for each row its place in the list.
        skipped: the images that could not be used.
    """

    embeddings: Rows
    kept: list[int]
    skipped: list[Skipped]


def encode(text: TextTower, vision: VisionTower, inputs: Any, options: EncodeOptions) -> Rows | Encoded:
    """See `DualEncoder.encode`."""
    single = is_single(inputs)
    texts, pictures = told_apart([inputs] if single else inputs)
    if options.task is not None and options.task not in text.config.tasks:
        known = list(text.config.tasks) or "no tasks: leave task out"
        raise UserError(f"unknown task {options.task!r}; this model knows {known}")
    dims = options.truncate_dim if options.truncate_dim is not None else text.config.truncate_dim or text.config.width
    shared: dict[str, Any] = {"truncate_dim": dims, "normalize": options.normalize}
    if options.batch_size is not None:
        shared["batch_size"] = options.batch_size
    rows: dict[int, np.ndarray] = {}
    if texts or not pictures:  # of an empty list the text tower checks the options
        found = text.encode(
            list(texts.values()),
            task=options.task,
            max_length=options.max_length,
            show_progress=options.show_progress,
            **shared,
        )
        rows |= dict(zip(texts, found, strict=True))
    skipped: list[Skipped] | None = [] if options.errors == "skip" else None
    if pictures:
        found = vision.encode(_shown(pictures, options, skipped), **shared)
        gone = {each.place for each in skipped or ()}
        rows |= dict(zip([p.place for p in pictures if p.place not in gone], found, strict=True))
    kept = sorted(rows)
    whole = np.stack([rows[index] for index in kept]) if kept else np.empty((0, dims), np.float32)
    result = _converted(whole[0] if single and kept else whole, options, text.emb_ln.weight.device)
    return result if skipped is None else Encoded(result, kept, skipped)


def _shown(pictures: list[Picture], options: EncodeOptions, skipped: list[Skipped] | None) -> Any:
    """The images, read while they are encoded, with a progress bar if it is wanted."""
    from tqdm.auto import tqdm

    images = opened(pictures, options.urls, skipped)
    return tqdm(images, desc="embedding", unit="image", total=len(pictures)) if options.show_progress else images


def _converted(rows: np.ndarray, options: EncodeOptions, device: torch.device) -> Rows:
    if options.convert_to_tensor:
        return torch.from_numpy(rows).to(device)
    if options.convert_to_numpy:
        return rows
    whole = torch.from_numpy(rows).to(device)
    return whole if whole.ndim == 1 else list(whole)


def similarity(first: Any, second: Any) -> Tensor:
    """Cosine similarities `[N, M]` of rows `[N, D]` and `[M, D]`, or of single ones `[D]`."""
    a, b = (F.normalize(_tensor(rows), dim=-1) for rows in (first, second))
    if a.shape[-1] != b.shape[-1]:
        raise UserError(
            f"embeddings have {a.shape[-1]} and {b.shape[-1]} dims; expected the same truncate_dim for both"
        )
    return a @ b.to(a.device).T


def _tensor(rows: Any) -> Tensor:
    stacked = torch.stack(rows) if isinstance(rows, list) and rows and isinstance(rows[0], Tensor) else rows
    tensor = torch.as_tensor(stacked).float()
    return tensor[None] if tensor.ndim == 1 else tensor
