"""A timm model's shape as a VisionTowerConfig, or an error that names how it differs from every VisionTower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vision_tower.config import MOST_LAYERS, PREPROCESSING, VisionTowerConfig
from vision_tower.fields import COUNT, FLAG, OBJECT, PLAIN, SIDES, SIZE, TEXT, field

TIMM_ENTRY = "eva02_large_patch14_clip_224"

_USE = (
    "use one of eva02_base_patch16_clip_224, eva02_large_patch14_clip_224, eva02_large_patch14_clip_336, "
    "eva02_base_patch14_*, eva02_large_patch14_*"
)

# The arguments that a directory may give to timm's Eva models. Everything else is refused whatever timm's version makes
# of it: some name files to read, and timm before 1.0.26 read those as pickles that may run code.
_ARGUMENTS = """
img_size patch_size in_chans num_classes global_pool embed_dim depth num_heads qkv_bias qkv_fused qk_norm mlp_ratio
swiglu_mlp swiglu_align_to scale_mlp scale_attn_inner attn_type drop_rate pos_drop_rate patch_drop_rate
proj_drop_rate attn_drop_rate drop_path_rate init_values class_token num_reg_tokens no_embed_class use_abs_pos_emb
use_rot_pos_emb rope_type rope_grid_offset rope_grid_indexing rope_temperature rope_rotate_half rope_shift_coords
rope_jitter_coords rope_rescale_coords use_post_norm use_pre_transformer_norm use_post_transformer_norm use_fc_norm
attn_pool_num_heads attn_pool_mlp_ratio dynamic_img_size dynamic_img_pad ref_feat_shape head_init_scale
"""
_KINDS = {
    **dict.fromkeys(("depth", "embed_dim", "num_heads", "in_chans"), COUNT),
    **dict.fromkeys(("img_size", "patch_size", "ref_feat_shape"), SIDES),
}
_LARGEST = 2**14  # of whole numbers, but MOST_LAYERS of depth: timm would build a billion blocks before we refuse them
# Keys of pretrained_cfg that are handed to timm, and those without influence on a model that is read from a directory.
_FOR_IMAGES = (*PREPROCESSING, "input_size", "fixed_input_size", "num_classes")
_OF_PRETRAINED = """
url file state_dict hf_hub_id hf_hub_filename source architecture tag custom_load test_input_size min_input_size
test_crop_pct label_offset label_names label_descriptions pool_size test_pool_size first_conv classifier license
description origin_url paper_name paper_ids notes num_features labels
"""

# Attributes without influence on the output: training, and checks of sizes.
_OF_TRAINING = {"head_init_scale", "training"}
_SIZE_CHECKS = {"dynamic_img_size", "strict_img_size", "output_fmt", "feat_shape", "flatten"}
# Checked one by one, with their own messages.
_CHECKED = {"global_pool", "num_classes", "ref_feat_shape"}
_HEAD = ("head", "head_drop", "norm", "fc_norm", "patch_drop")

# Keys of config.json: timm's, and those that transformers adds when it wraps a timm model.
DIRECTORY_KEYS = {
    *("architecture", "num_classes", "num_features", "global_pool", "model_args", "pretrained_cfg"),
    *("label_names", "label_descriptions", "labels", "id2label", "label2id", "num_labels", "problem_type"),
    *("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "initializer_range"),
    *(
        "do_pooling",
        "image_processor_type",
        "_name_or_path",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_encoder_decoder",
    ),
    *("chunk_size_feed_forward", "_attn_implementation_autoset", "license", "tags", "library_name", "description"),
}


def directory_config(
    values: Mapping[str, Any], source: Path, *, num_classes: int | None, global_pool: str | None
) -> VisionTowerConfig:
    """The shape and preprocessing of a timm directory: timm builds a model without weights from
    what its config.json has of known arguments; timm itself is not shown the directory.

    Raises:
        ValueError: it names `source` and whatever timm would apply and a tower would not.
    """
    name = field(values, "architecture", TEXT, source)
    arguments = field(values, "model_args", OBJECT, source, {})
    _check_directory(values, arguments, source)
    model = meta_model(name, arguments, source, _pretrained(values, source))
    try:
        for key in ("num_classes", "num_features", "global_pool"):
            found = getattr(model, key, None)
            if values.get(key, found) not in (found, None):
                raise ValueError(f"{key} is {values[key]!r}, and its model_args make a model of {found!r}; correct one")
        config = config_of(model, name, arguments, num_classes=num_classes, global_pool=global_pool)
        stated = field(values, "pretrained_cfg", OBJECT, source, {}).get("input_size")
        size = [3, *model.patch_embed.img_size]
        if stated is not None and list(stated) != size:
            raise ValueError(
                f"pretrained_cfg's input_size is {list(stated)}, and the model takes {size}; correct input_size or "
                "model_args' img_size, and give resolution= to change it after loading"
            )
        return config.changed(preprocessing_of(model))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def meta_model(
    name: str, arguments: Mapping[str, Any], source: object, pretrained: Mapping[str, Any] | None = None
) -> Any:
    """timm's model of a name that a file gives, on the meta device. It is made by timm's function of that name, and not
    by `create_model`, which takes paths and hub names for names, and reads files.

    Raises:
        ValueError: timm has no Eva model of that name, or it does not take the arguments; it names `source`.
    """
    from timm import models

    timms: Any = models
    if not timms.is_model_in_modules(name, {"eva"}):
        raise ValueError(f"{source}: timm cannot make {name!r} (Unknown model among its Eva models); {_USE}")
    try:
        with torch.device("meta"):
            return timms.model_entrypoint(name)(pretrained=False, pretrained_cfg=pretrained, **arguments)
    except Exception as error:  # timm raises many kinds for arguments that are not its own
        raise ValueError(f"{source}: timm cannot make {name!r} with its model_args ({error}); correct them") from error


def _pretrained(values: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """What timm is told of a directory's images. Old directories have these keys at the top."""
    found = field(values, "pretrained_cfg", OBJECT, source) if "pretrained_cfg" in values else values
    if unknown := sorted(found.keys() - {*_FOR_IMAGES, *_OF_PRETRAINED.split()}):
        raise ValueError(f"{source}: pretrained_cfg has {', '.join(unknown)}, not known here; correct or remove them")
    kinds = {"input_size": SIZE, "fixed_input_size": FLAG}
    told = {key: field(found, key, kinds.get(key, PLAIN), source, None) for key in _FOR_IMAGES}
    told = {"source": "local-dir", **{key: value for key, value in told.items() if value is not None}}
    if values.get("num_classes") is not None:
        told["num_classes"] = field(values, "num_classes", PLAIN, source)
    return told


def _check_directory(values: Mapping[str, Any], arguments: Mapping[str, Any], source: Path) -> None:
    """That config.json has only keys and model_args that are known here."""
    if unknown := sorted(arguments.keys() - set(_ARGUMENTS.split())):
        raise ValueError(
            f"{source}: timm's Eva models do not take {', '.join(unknown)} of its model_args; correct or remove them"
        )
    for key in arguments:
        value = field(arguments, key, _KINDS.get(key, PLAIN), f"{source}: model_args", 0)
        most = MOST_LAYERS if key == "depth" else _LARGEST
        if any(isinstance(n, int) and abs(n) > most for n in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{source}: model_args: {key} is {value!r}; expected at most {most:,}")
    if "pretrained_cfg" in values and (
        unknown := sorted(key for key in values.keys() - DIRECTORY_KEYS if values[key] is not None)
    ):
        raise ValueError(f"{source}: {', '.join(unknown)} is not known here; remove what has no bearing on the model")
    if values.get("do_pooling", True) is not True:
        raise ValueError(
            f"{source}: do_pooling is {values['do_pooling']!r}, and a VisionTower gives the class token alone"
        )


def preprocessing_of(model: Any) -> dict[str, Any]:
    """The preprocessing that timm's own data configuration has for a model, under the names of our fields."""
    from timm import data

    timms: Any = data
    found = timms.resolve_data_config({}, model=model)
    return {name: found[name] for name in PREPROCESSING}


def check_stated(num_classes: Any, global_pool: Any) -> None:
    """Raises ValueError for options that no VisionTower can fulfil, whatever its weights are read from."""
    for option, value, allowed in (("num_classes", num_classes, 0), ("global_pool", global_pool, "token")):
        if value not in (None, allowed) or isinstance(value, bool):
            raise ValueError(f"{option} is {value!r}; a VisionTower can only have {allowed!r}")


def config_of(
    model: Any, name: str, arguments: Mapping[str, Any], *, num_classes: int | None, global_pool: str | None
) -> VisionTowerConfig:
    """The shape of a timm model; preprocessing stays at the default.

    Args:
        model: timm's.
        name, arguments: those that it was built with, for messages.
        num_classes: 0 takes a model with a head without it.
        global_pool: "token" takes the class token of a model that pools otherwise.

    Raises:
        ValueError: a property that no VisionTower has; the message has both values.
    """
    check_stated(num_classes, global_pool)
    given = f" (made with {', '.join(f'{key}={value!r}' for key, value in arguments.items())})" if arguments else ""
    config = _shape_of(model, name, given)
    if apart := _apart(model, config):
        raise ValueError(f"timm's {name}{given} is not what a VisionTower is: {'; '.join(apart[:5])}")
    if model.global_pool != "token" and global_pool != "token":
        raise ValueError(
            f"timm's {name} has global_pool {model.global_pool!r}, and a VisionTower gives the class token ('token'); "
            "state global_pool='token' to take its weights all the same, to train on, with its final norm"
        )
    if model.num_classes > 0 and num_classes != 0:
        raise ValueError(
            f"timm's {name} has num_classes {model.num_classes}, the outputs of a head, and a VisionTower has no head "
            "(0); state num_classes=0 to take the encoder without it"
        )
    return config


def _shape_of(model: Any, name: str, given: str) -> VisionTowerConfig:
    from timm.models.eva import Eva, EvaBlock

    block: Any = model.blocks[0] if isinstance(model, Eva) else None
    if not isinstance(block, EvaBlock) or getattr(block.attn, "q_proj", None) is None or model.rope is None:
        raise ValueError(f"timm's {name}{given} is no EVA02 model with separate q, k, v and a normed SwiGLU; {_USE}")
    reference = getattr(model.rope, "ref_feat_shape", None)
    if (reference and reference[0] != reference[1]) or len(set(model.patch_embed.patch_size)) > 1:
        raise ValueError(
            f"timm's {name} has a reference grid of {reference} and patches of {model.patch_embed.patch_size}; a "
            "VisionTower's are square"
        )
    height, width = model.patch_embed.img_size
    return VisionTowerConfig(
        resolution=height if height == width else (height, width),
        patch=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        layers=len(model.blocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.fc2.in_features,
        reference_grid=reference[0] if reference else None,
        rope_theta=float(model.rope.temperature),
        attention_norm=not isinstance(block.attn.norm, nn.Identity),
        layer_norm_eps=block.norm1.eps,
    )


def _apart(model: nn.Module, config: VisionTowerConfig) -> list[str]:
    """How a model differs from the one that timm builds with our arguments: modules, their settings, and shapes."""
    import timm

    with torch.device("meta"):
        ours = timm.create_model(TIMM_ENTRY, **config.timm_arguments())
    found, wanted = _facts(model), _facts(ours)
    apart = [
        f"{key} is {found.get(key)!r}, and there {wanted.get(key)!r}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    norms = [name for name in ("norm", "fc_norm") if not isinstance(getattr(model, name), nn.Identity)]
    if len(norms) != 1:
        apart.append(f"its final norms are {norms}, and there it is one")
    return apart


def _facts(model: nn.Module) -> dict[str, Any]:
    """Type and settings of each module, shape of each parameter."""
    facts: dict[str, Any] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if path.split(".")[0] in _HEAD or kind in ("Identity", "Dropout", "DropPath"):
            continue
        facts[path or "the model"] = kind
        for name, value in vars(module).items():
            if name.startswith("_") or name in _OF_TRAINING | _SIZE_CHECKS | _CHECKED:
                continue
            if value is None or isinstance(value, bool | int | float | str | tuple):
                facts[f"{path}.{name}".lstrip(".")] = value
        for name, parameter in module.named_parameters(recurse=False):
            facts[f"{path}.{name}".lstrip(".")] = list(parameter.shape)
    return facts
