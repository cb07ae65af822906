"""Reads a directory of open_clip as one model: a text tower of transformers (jina_embeddings_v3), an image tower of
timm (EVA02), and no projection after either; what `formats.open_clip` writes, and what others write so.

The towers read their halves of it (`TextTower.from_pretrained`, `VisionTower.from_pretrained`) by the config.json that
stands in it: each key of its JSON files is followed or refused by name. Here is what belongs to neither: the
temperature, and that both towers are made from one place and the file holds nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from text_tower.layouts import Layout
from text_tower.lora import is_adapter
from text_tower.open_clip_folder import CONFIG_FILE, STEMS
from torch import Tensor

from stage_trainer.errors import UserError
from stage_trainer.files import read_json
from stage_trainer.formats.parts import (
    BIASES,
    Parts,
    as_scale,
    few,
    scalar,
    stated_biases,
    stated_dims,
    stated_text_scale,
)

SCALE, BIAS = "logit_scale", BIASES[0]
_LAYOUT, _VISION = Layout("open-clip", "text.transformer."), "visual.trunk."
_WEIGHTS = (f"{STEMS[0]}.safetensors", f"{STEMS[1]}.bin")


def is_one(folder: Path) -> bool:
    """Whether a directory is open_clip's."""
    return (folder / CONFIG_FILE).is_file()


def named(text: dict[str, Tensor], vision: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dicts of two towers under open_clip's names; not copies."""
    plain = {name: tensor for name, tensor in text.items() if not is_adapter(name)}
    return {**_LAYOUT.from_ours(plain), **{f"{_VISION}{name}": tensor for name, tensor in vision.items()}}


def read(folder: Path, text: dict[str, Any], vision: dict[str, Any]) -> Parts:
    """The model in a directory; `text` and `vision` are options of the towers' `from_pretrained`.

    Raises:
        UserError: a file is missing or damaged, a key of its JSON files is not known, its towers are others, or tensors
            are missing, too many or of another shape; the message names them.
    """
    from text_tower import TextTower
    from text_tower.files import read_shapes
    from vision_tower import VisionTower

    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(
            f"cannot load {folder}: it has {CONFIG_FILE} and none of {', '.join(_WEIGHTS)}; copy or download it again"
        )
    if (folder / "model.safetensors").is_file():
        raise UserError(
            f"cannot load {folder}: model.safetensors stands beside open_clip's weights; move the one away that is not "
            "meant"
        )
    try:
        towers = TextTower.from_pretrained(folder, **text), VisionTower.from_pretrained(folder, **vision)
        _check_one_place(folder)
        keys = read_shapes(folder, *STEMS)
    except (ValueError, OSError) as error:  # the towers say what is missing or damaged
        raise UserError(
            f"cannot load {folder}: {error}. (Of open_clip's models with an EVA02 image tower that one can be started "
            "from: name the directory as model.vision_weights of a recipe)"
        ) from error
    known = named(towers[0].state_dict(), towers[1].state_dict())
    if others := sorted(keys.keys() - known.keys() - {SCALE, BIAS}):
        raise UserError(
            f"cannot load {folder}: its weights have {few(others)}, which is neither in its towers nor the "
            "temperature; such a model computes something else"
        )
    if (scales := held_scales(folder)) is None:
        raise UserError(f"cannot load {folder}: its weights have no {SCALE}; expected ln(1 / temperature)")
    return Parts(*towers, *scales, stated_dims(folder, towers[0].config.width), held_biases(folder))


def held_scales(folder: Path) -> tuple[float, float] | None:
    """ln(1 / temperature) of the image-text task and of the text task; None if the weights have none."""
    found = scalar(folder, SCALE, _WEIGHTS)
    if found is None:
        return None
    scale = as_scale(found, folder)
    return scale, stated_text_scale(folder, scale)


def held_biases(folder: Path) -> tuple[float, float] | None:
    """A sigmoid loss's biases, of the image-text task (open_clip's `logit_bias`) and of the text task; None if it has
    none."""
    found = scalar(folder, BIAS, _WEIGHTS)
    return None if found is None else stated_biases(folder, float(found))


def _check_one_place(folder: Path) -> None:
    """That config.json here is what both towers are made by, of a directory whose other keys the towers have read."""
    model = read_json(folder / CONFIG_FILE)["model_cfg"]
    images, texts = model["vision_cfg"]["timm_model_name"], model["text_cfg"]["hf_model_name"]
    _, directory, place = images.partition(":")
    if directory and place != texts:
        raise ValueError(
            f"{CONFIG_FILE} makes the image tower from {images!r} and the text tower from {texts!r}; expected both "
            "from the directory whose config.json is here"
        )
