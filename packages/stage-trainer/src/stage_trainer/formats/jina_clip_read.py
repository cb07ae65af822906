"""Reads a directory in the layout of the published jina-clip-v2 or -v1 as one model.

The towers read their halves of it (`TextTower.from_pretrained`, `VisionTower.from_pretrained`): each key of its JSON
files is followed or refused by name. `parts` reads what belongs to neither; here is that the file holds nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stage_trainer.errors import UserError
from stage_trainer.files import read_json
from stage_trainer.formats.onnx import graphs_in
from stage_trainer.formats.parts import (
    Parts,
    as_scale,
    few,
    scalar,
    stated_biases,
    stated_dims,
    stated_text_scale,
)

MODEL_TYPE = "jina_clip"


def is_one(folder: Path) -> bool:
    """Whether a directory's config.json says that it is of this layout."""
    try:
        return read_json(folder / "config.json").get("model_type") == MODEL_TYPE
    except ValueError:
        return False


def read(folder: Path, text: dict[str, Any], vision: dict[str, Any]) -> Parts:
    """The model in a directory; `text` and `vision` are options of the towers' `from_pretrained`.

    Raises:
        UserError: a file is missing or damaged, a key of its JSON files is not known, or tensors are missing, too many
            or of another shape; the message names them.
    """
    from text_tower import TextTower
    from text_tower.files import read_shapes
    from vision_tower import VisionTower

    from stage_trainer.formats import jina_clip_layout, jina_clip_v1_layout

    if graphs_in(folder):
        raise UserError(
            f"{folder} holds ONNX graphs and no weights: it is for ONNX Runtime and transformers.js (its README.md has "
            "examples). Name the model that it was exported from"
        )
    try:
        towers = TextTower.from_pretrained(folder, **text), VisionTower.from_pretrained(folder, **vision)
        keys = read_shapes(folder)
    except (ValueError, OSError) as error:  # the towers say what is missing or damaged
        raise UserError(f"cannot load {folder}: {error}") from error
    layout: Any = {"rotary": jina_clip_layout, "alibi": jina_clip_v1_layout}[towers[0].config.positions]
    if others := layout.unnamed(keys, towers[0].config, towers[1].config):
        raise UserError(
            f"cannot load {folder}: its weights have {few(others)}, which {layout.NAME} does not; such a model "
            "computes something else. Expected its layout exactly"
        )
    found = scalar(folder)
    if found is None or found.ndim:
        has = "none" if found is None else f"one of shape {list(found.shape)}"
        raise UserError(f"cannot load {folder}: its weights have no logit_scale of shape [], but {has}")
    scale = as_scale(found, folder)
    dims = stated_dims(folder, towers[0].config.width)
    return Parts(*towers, scale, stated_text_scale(folder, scale), dims, stated_biases(folder))
