"""What a foreign directory of two towers says beside them: temperatures, a sigmoid loss's biases, trained dims."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from text_tower.config_keys import CLIP_KEY

from stage_trainer.errors import UserError
from stage_trainer.files import read_json

if TYPE_CHECKING:
    from text_tower import TextTower
    from torch import Tensor
    from vision_tower import VisionTower

BIASES = ("logit_bias", "text_logit_bias")
"""What a sigmoid loss learns beside the temperatures: names of `DualEncoder`'s parameters, and of keys."""


class Parts(NamedTuple):
    """What a model is made of. The published one has a single temperature, which both tasks then have, and no biases of
    a sigmoid loss."""

    text: TextTower
    vision: VisionTower
    logit_scale: float
    text_logit_scale: float
    dims: tuple[int, ...] | None
    biases: tuple[float, float] | None = None


def few(names: list[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def scalar(
    folder: Path, name: str = "logit_scale", weights: tuple[str, str] = ("model.safetensors", "pytorch_model.bin")
) -> Tensor | None:
    """A tensor of one number in a directory's file of weights (safetensors or a pickle); None if there is no such file
    or name.

    Raises:
        UserError: the file cannot be read.
    """
    import torch

    found: Any = None
    try:
        if (file := folder / weights[0]).is_file():
            from safetensors import safe_open

            with safe_open(file, framework="pt") as tensors:
                found = tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118
        elif (file := folder / weights[1]).is_file():
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            found = content.get(name) if isinstance(content, dict) else None
    except Exception as error:  # torch and safetensors raise many kinds for a file that is not theirs
        raise UserError(f"{file} cannot be read for its {name} ({error}); copy or download it again") from error
    if found is not None and not (isinstance(found, torch.Tensor) and found.numel() == 1):
        raise UserError(f"{file}: {name} is {str(found)[:200]}; expected one number")
    return found


def as_scale(tensor: Tensor, folder: Path) -> float:
    """The number in it, or UserError if that is no ln(1 / temperature)."""
    number = float(tensor)
    if not abs(number) <= 20:
        raise UserError(f"{folder}: logit_scale is {number}; expected ln(1 / temperature), a number from -20 to 20")
    return number


def stated_text_scale(folder: Path, scale: float) -> float:
    """ln(1 / temperature) of the text task in a directory that we wrote, or else `scale`.

    Raises:
        UserError: config.json says something else there.
    """
    return _stated(folder, "text_logit_scale", 20, scale)


def stated_biases(folder: Path, in_weights: float | None = None) -> tuple[float, float] | None:
    """A sigmoid loss's biases, of the image-text and the text task, in a directory that we wrote; None if it has none.

    Args:
        in_weights: the first, where the weights have it.

    Raises:
        UserError: config.json says something else there.
    """
    if in_weights is None and not any(name in _ours(folder) for name in BIASES):
        return None
    first = _stated(folder, BIASES[0], 1000, None) if in_weights is None else in_weights
    return first, _stated(folder, BIASES[1], 1000, first)


def _ours(folder: Path) -> dict[str, Any]:
    """What a directory that we wrote says beside the published keys."""
    file = folder / "config.json"
    ours = read_json(file).get(CLIP_KEY) or {}
    known = {"text", "vision", "text_logit_scale", *BIASES}
    if not isinstance(ours, dict) or (unknown := ours.keys() - known):
        named = ", ".join(sorted(unknown)) if isinstance(ours, dict) else str(ours)[:200]
        raise UserError(f"{file}: {CLIP_KEY} has {named}, not known there; remove it, or export the model again")
    return ours


def _stated(folder: Path, key: str, most: int, default: float | None) -> float:
    found = _ours(folder).get(key, default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) <= most:
        raise UserError(
            f"{folder / 'config.json'}: {CLIP_KEY}.{key} is {str(found)[:200]!r}; expected a number from -{most} to "
            f"{most}"
        )
    return float(found)


def stated_dims(folder: Path, width: int) -> tuple[int, ...] | None:
    """`matryoshka_dimensions`, as far as the towers have so many."""
    found = read_json(folder / "config.json").get("matryoshka_dimensions")
    if found is not None and not (isinstance(found, list) and all(type(n) is int and 0 < n < 2**31 for n in found)):
        raise UserError(
            f"{folder / 'config.json'}: matryoshka_dimensions is {str(found)[:200]}; expected a list of dims, or null"
        )
    if beyond := [dim for dim in found or () if dim > width]:
        warnings.warn(f"{folder} says dims {beyond}, but is {width} wide; they are left out", stacklevel=4)
    return tuple(dim for dim in found or () if dim <= width) or None
