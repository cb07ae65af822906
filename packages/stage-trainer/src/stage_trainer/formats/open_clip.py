"""`--format open-clip`: a directory that open_clip 3.3 loads: a text tower of transformers, an image tower of timm.

    open_clip_config.json       what open_clip makes: both towers by the config.json beside it
    config.json                 transformers' (jina_embeddings_v3), timm's and ours at once: none minds the others' keys
    open_clip_model.safetensors the weights of both, and the temperature
    tokenizer.json, …           read by AutoTokenizer

open_clip looks the text tower's `model_type` up in a table of five, for the name of its width, and none of the five has
rotary positions. transformers chooses the class by `model_type` and then lets config.json rename attributes
(`attribute_map`): so the configuration, once it is made, calls itself "xlm-roberta", which is in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from text_tower import TextTowerConfig
from text_tower.config_json import to_json
from text_tower.config_keys import CLIP_KEY, OPEN_CLIP_RENAMES
from text_tower.files import write_json, write_weights
from text_tower.open_clip_folder import CONFIG_FILE
from text_tower.projector import without_projector
from text_tower.st_folder import MAX_LENGTH
from torch import Tensor
from vision_tower import VisionTowerConfig
from vision_tower.config import as_pair
from vision_tower.foreign import timm_keys
from vision_tower.projector import is_projector
from vision_tower.projector import without_projector as without_images_projector

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.files import whole_directory
from stage_trainer.formats.common import Adapters, check
from stage_trainer.formats.jina_clip import scalars
from stage_trainer.formats.open_clip_read import BIAS, SCALE, named

_RESIZE_MODES = {"center": "shortest", "squash": "squash"}
_INTERPOLATIONS = ("bicubic", "bilinear")


def write(model: DualEncoder, out: Path, repository: str | None, card: Callable[[Adapters], str]) -> Adapters:
    """Writes the directory, completely or not at all. The default adapter is added to the weights.

    Args:
        model: its text tower is replaced if an adapter is merged into it.
        repository: OWNER/NAME of the hub from which it will be loaded; None if from `out` itself. open_clip makes the
            towers from what this names, so the directory is of no use elsewhere.
        card: gives README.md, from what became of the adapters.

    Raises:
        UserError: `out` exists, the disk is full, or open_clip cannot be told what the model is.
    """
    check(model)
    _check_images(model.vision.config)
    _projection(model.vision.config)
    _text_projection(model.text.config)
    names = model.text.config.adapters
    if names:
        model.text = model.text.merged()
    model.vision = model.vision.merged()
    adapters = Adapters(merged=names[:1], left_out=names[1:])
    assert model.text.tokenizer is not None  # `check` saw it
    towers = without_projector(model.text.state_dict()), without_images_projector(model.vision.state_dict())
    weights = named(*towers) | _projectors(model)
    weights[SCALE] = model.logit_scale.detach().reshape(())
    if model.logit_bias is not None:
        weights[BIAS] = model.logit_bias.detach().reshape(())
    with whole_directory(out) as directory:
        write_weights(weights, directory / "open_clip_model.safetensors")
        write_json(_config(model), directory / "config.json")
        write_json(
            _open_clip_config(model, repository or str(out.resolve()), repository is None), directory / CONFIG_FILE
        )
        model.text.tokenizer.save_for_others(directory)
        (directory / "README.md").write_text(card(adapters), encoding="utf-8")
    return adapters


def _check_images(config: VisionTowerConfig) -> None:
    """UserError for what open_clip's preprocessing has no word for."""
    height, width = as_pair(config.resolution)
    found = None
    if config.crop_pct != 1:
        found = f"crop_pct {config.crop_pct:g}: it resizes to the size that the model takes, and cuts nothing off"
    elif config.crop_mode not in _RESIZE_MODES or (config.crop_mode == "center" and height != width):
        found = f"crop_mode {config.crop_mode} to {height}x{width}; it knows center to a square, and squash"
    elif config.interpolation not in _INTERPOLATIONS:
        found = f"interpolation {config.interpolation}; it knows {' and '.join(_INTERPOLATIONS)}"
    if found:
        raise UserError(f"open_clip has no word for the image tower's {found}. Export it in another format")


def _projection(config: VisionTowerConfig) -> dict[str, Any]:
    """What open_clip is told of the projector; UserError for one that it does not have."""
    if not config.projector:
        return {"timm_proj": "none"}
    if config.projector_hidden not in (0, 2 * config.projector):
        raise UserError(
            f"the image tower's projector has {config.projector_hidden} hidden units, and open_clip's twice as many as "
            f"outputs, {2 * config.projector}; export it in another format"
        )
    return {"timm_proj": "mlp" if config.projector_hidden else "linear", "timm_proj_bias": True}


def _text_projection(config: TextTowerConfig) -> str | None:
    """The kind of the text tower's projector in open_clip; UserError for one that it does not have."""
    if not config.projector:
        return None
    if config.projector_hidden not in (0, half := (config.width + config.projector) // 2):
        raise UserError(
            f"the text tower's projector has {config.projector_hidden} hidden units, and open_clip's the mean of its "
            f"inputs and outputs, {half}; export it in another format"
        )
    return "mlp" if config.projector_hidden else "linear"


def _projectors(model: DualEncoder) -> dict[str, Tensor]:
    """The projectors' weights under open_clip's names."""
    names = {"projector.": "proj.", "projector.0.": "mlp.fc1.", "projector.2.": "mlp.fc2."}
    found = {
        name.rpartition(".")[::2]: tensor for name, tensor in model.vision.state_dict().items() if is_projector(name)
    }
    images = {f"visual.head.{names[f'{module}.']}{part}": tensor for (module, part), tensor in found.items()}
    texts = model.text.state_dict().items()
    return images | {f"text.{name.replace('projector', 'proj')}": t for name, t in texts if is_projector(name)}


def _config(model: DualEncoder) -> dict[str, Any]:
    """config.json, for transformers and timm."""
    dtype = str(next(model.text.parameters()).dtype).removeprefix("torch.")
    assert model.text.tokenizer is not None
    ours = scalars(model)
    return {
        **timm_keys(model.vision.config, with_processor=False),
        **to_json(model.text.config, dtype, "JinaEmbeddingsV3Model", model.text.tokenizer.fingerprint),
        **OPEN_CLIP_RENAMES,
        "matryoshka_dimensions": list(model.matryoshka_dims) if model.matryoshka_dims else None,
        **({CLIP_KEY: ours} if ours else {}),
    }


def _open_clip_config(model: DualEncoder, place: str, local: bool) -> dict[str, Any]:
    text, vision = model.text.config, model.vision.config
    size = vision.resolution if isinstance(vision.resolution, int) else list(vision.resolution)
    return {
        "model_cfg": {
            "embed_dim": text.output_width,
            **({} if model.logit_bias is None else {"init_logit_bias": float(model.logit_bias.detach())}),
            "vision_cfg": {
                "image_size": size,
                "timm_model_name": f"{'local-dir' if local else 'hf-hub'}:{place}",
                "timm_model_pretrained": False,
                "timm_pool": "token",
                **_projection(vision),
            },
            "text_cfg": {
                "context_length": context_length(text),
                "vocab_size": text.vocab_size,
                "hf_model_name": place,
                "hf_tokenizer_name": place,
                "hf_pooler_type": "mean_pooler",
                "hf_proj_type": _text_projection(text),
            },
        },
        "preprocess_cfg": {
            "size": size,
            "mode": "RGB",
            "mean": list(vision.mean),
            "std": list(vision.std),
            "interpolation": vision.interpolation,
            "resize_mode": _RESIZE_MODES[vision.crop_mode],
        },
    }


def context_length(config: TextTowerConfig) -> int:
    """Tokens to which open_clip pads every text, and cuts it."""
    return min(MAX_LENGTH, config.max_length)
