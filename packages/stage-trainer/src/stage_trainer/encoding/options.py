"""Options of `DualEncoder.encode`, under our names and sentence-transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from stage_trainer.encoding.fetch import UrlLimits
from stage_trainer.errors import UserError
from stage_trainer.metrics.quantization import check_precision

_SYNONYMS = {"prompt_name": "task", "show_progress_bar": "show_progress", "normalize_embeddings": "normalize"}


@dataclass(frozen=True)
class EncodeOptions:
    """How a list is encoded.

    Args:
        task: for the texts, as of `TextTower.encode`; sentence-transformers' prompt_name. Images have none.
        truncate_dim: keep the first dims only (Matryoshka), before the rows are normalised; None for all.
        max_length: tokens kept of each text, the instruction included.
        batch_size: most texts or images in one forward pass; None for each tower's own.
        normalize: scale every row to length 1; sentence-transformers' normalize_embeddings, off by default
            there.
        show_progress: draw progress bars; sentence-transformers' show_progress_bar.
        convert_to_numpy: an array of float32; without it, and without convert_to_tensor, a list of tensors.
        convert_to_tensor: one tensor, on the model's device; it goes before convert_to_numpy.
        device: where to encode: the model moves there, and stays. None for where it is.
        precision: of the result: "float32", "float16", "int8", "uint8", "binary" or "ubinary", as
            `quantize_embeddings` makes them; int8 and uint8 by the ranges of these embeddings, so of two lists they
            cannot be compared: encode in float32, and quantize both by the same ranges.
        dtype: in which the towers compute: "float32", "bfloat16", "float16"; "auto" is the second on GPUs (the third on
            those without it) and float32 on the CPU. Weights and results are float32.
        threads: that read, decode and resize images ahead of the tower; None for one a core, up to sixteen.
        max_pixels: larger images are refused by their header; None for where Pillow refuses them.
        errors: "raise" at the first image that cannot be used, or "skip" such images and say which.
        urls: how much is fetched of an image's URL, and how long that may take.
    """

    task: str | None = None
    truncate_dim: int | None = None
    max_length: int = 512
    batch_size: int | None = None
    normalize: bool = True
    show_progress: bool = False
    convert_to_numpy: bool = True
    convert_to_tensor: bool = False
    device: Any = None
    precision: str = "float32"
    dtype: str = "auto"
    threads: int | None = None
    max_pixels: int | None = None
    errors: str = "raise"
    urls: UrlLimits = field(default_factory=UrlLimits)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> EncodeOptions:
        """From keywords of either name.

        Raises:
            UserError: an unknown one, two that contradict each other, or a value that there is not.
        """
        known = [f.name for f in fields(cls)]
        values: dict[str, Any] = {}
        for name, value in given.items():
            ours = _SYNONYMS.get(name, name)
            if ours not in known:
                raise UserError(f"encode has no option {name!r}; it has {', '.join([*known, *_SYNONYMS])}")
            if values.get(ours, value) != value:
                raise UserError(f"{name} is {value!r}, and {ours}, which means the same, {values[ours]!r}; give one")
            values[ours] = value
        if values.get("show_progress", False) is None:  # sentence-transformers' default
            values["show_progress"] = False
        made = cls(**values)
        check_precision(made.precision)
        for name in ("threads", "max_pixels"):
            value = getattr(made, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name} is {value!r}; expected a whole number from 1, or None")
        if made.errors not in ("raise", "skip"):
            raise UserError(f"errors is {made.errors!r}; expected 'raise' or 'skip'")
        return made
