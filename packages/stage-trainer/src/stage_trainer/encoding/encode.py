"""A list of texts and images to rows, in the order of the list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stage_trainer.encoding.ahead import ahead, available
from stage_trainer.encoding.inputs import Picture, Skipped, is_single, load, refuse, told_apart
from stage_trainer.encoding.options import EncodeOptions
from stage_trainer.encoding.precision import computing_in, dtype_of
from stage_trainer.errors import UserError
from stage_trainer.metrics.quantization import check_precision, quantize_embeddings

if TYPE_CHECKING:
    from text_tower import TextTower
    from vision_tower import VisionTower

_IMAGES = 32  # in a forward pass, as `VisionTower.encode` has it
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
    default = text.config.truncate_dim or text.config.output_width
    dims = default if options.truncate_dim is None else options.truncate_dim
    options = replace(options, truncate_dim=dims)
    check_precision(options.precision, dims)
    device = text.emb_ln.weight.device
    rows: dict[int, np.ndarray] = {}
    skipped: list[Skipped] = []
    with computing_in(dtype_of(options.dtype, device), device):
        if texts or not pictures:  # of an empty list the text tower checks the options
            found = _of_texts(text, list(texts.values()), options)
            rows |= dict(zip(texts, found, strict=True))
        if pictures:
            found = _of_images(vision, pictures, options, skipped)
            gone = {each.place for each in skipped}
            rows |= dict(zip([p.place for p in pictures if p.place not in gone], found, strict=True))
    kept = sorted(rows)
    whole = np.stack([rows[index] for index in kept]) if kept else np.empty((0, dims), np.float32)
    _check_finite(whole, kept, options.dtype)
    whole = quantize_embeddings(whole, options.precision)
    result = _converted(whole[0] if single and kept else whole, options, device)
    return result if options.errors == "raise" else Encoded(result, kept, skipped)


def _of_texts(tower: TextTower, texts: list[str], options: EncodeOptions) -> np.ndarray:
    return tower.encode(
        texts, task=options.task, max_length=options.max_length, show_progress=options.show_progress, **_shared(options)
    )


def _of_images(
    tower: VisionTower, pictures: list[Picture], options: EncodeOptions, skipped: list[Skipped]
) -> np.ndarray:
    """Rows of the images that can be used; the others are added to `skipped`, unless errors are raised. Threads read,
    decode and resize what comes next."""

    def pixels(picture: Picture) -> Tensor | Skipped:
        return load(picture, options.urls, options.max_pixels, tower.preprocess)

    def usable() -> Iterator[Tensor]:
        made = ahead(pixels, pictures, options.threads or available())
        with closing(made):
            for found in _shown(made, len(pictures), options):
                if not isinstance(found, Skipped):
                    yield found
                elif options.errors == "raise":
                    refuse(found)
                else:
                    skipped.append(found)

    rows, images = [tower.encode([], **_shared(options))], usable()  # of none it checks the options
    with torch.inference_mode():
        while batch := list(islice(images, options.batch_size or _IMAGES)):
            pixels_of_batch = tower.normalize(torch.stack(batch).to(tower.pos_embed.device))
            found = tower(pixels_of_batch)[:, : options.truncate_dim].float()
            rows.append((F.normalize(found, dim=-1) if options.normalize else found).cpu().numpy())
    return np.concatenate(rows)


def _shared(options: EncodeOptions) -> dict[str, Any]:
    size = {} if options.batch_size is None else {"batch_size": options.batch_size}
    return {"truncate_dim": options.truncate_dim, "normalize": options.normalize, **size}


def _shown(made: Iterator[Any], count: int, options: EncodeOptions) -> Any:
    """The same, with a progress bar if it is wanted."""
    from tqdm.auto import tqdm

    return tqdm(made, desc="embedding", unit="image", total=count) if options.show_progress else made


def _check_finite(rows: np.ndarray, kept: list[int], dtype: str) -> None:
    """UserError if a vector holds nan or inf: float16 overflows in some models, and weights may be broken."""
    if (broken := np.flatnonzero(~np.isfinite(rows).all(axis=-1))).size:
        raise UserError(
            f"inputs[{kept[broken[0]]}]{f' and {broken.size - 1} more' if broken.size > 1 else ''}: the vector is not "
            f"finite (dtype {dtype!r}); try dtype='float32', and if that gives the same, the model's weights are broken"
        )


def _converted(rows: np.ndarray, options: EncodeOptions, device: torch.device) -> Rows:
    if options.convert_to_tensor:
        return torch.from_numpy(rows).to(device)
    if options.convert_to_numpy:
        return rows
    whole = torch.from_numpy(rows).to(device)
    return whole if whole.ndim == 1 else list(whole)


def similarity(first: Any, second: Any) -> Tensor:
    """Cosine similarities `[N, M]` of rows `[N, D]` and `[M, D]`, or of single ones `[D]`.

    Raises:
        UserError: they have different dims, or are quantized, so that their numbers are codes.
    """
    a, b = (F.normalize(_tensor(rows), dim=-1) for rows in (first, second))
    if a.shape[-1] != b.shape[-1]:
        raise UserError(
            f"embeddings have {a.shape[-1]} and {b.shape[-1]} dims; expected the same truncate_dim for both"
        )
    return a @ b.to(a.device).T


def _tensor(rows: Any) -> Tensor:
    stacked = torch.stack(rows) if isinstance(rows, list) and rows and isinstance(rows[0], Tensor) else rows
    tensor = torch.as_tensor(stacked)
    if not tensor.is_floating_point():
        raise UserError(
            f"embeddings are of {str(tensor.dtype).removeprefix('torch.')}: codes, whose cosine says nothing; compare "
            "those of precision float32 or float16"
        )
    tensor = tensor.float()
    return tensor[None] if tensor.ndim == 1 else tensor
