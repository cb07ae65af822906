"""Other projects' JSON files about an image tower: jina-clip's, open_clip's, and image processors'.

Each key is applied, or known to have no influence on the output, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vision_tower.config import PREPROCESSING, VisionTowerConfig, as_pair
from vision_tower.fields import COUNT, FLAG, NUMBER, OBJECT, TEXT, field, read_json, shown
from vision_tower.timm_models import DIRECTORY_KEYS, TIMM_ENTRY, config_of, directory_config, meta_model

PROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_TYPE = "CLIPImageProcessor"
OPEN_CLIP_NAME = "open_clip_config.json"
_DIRECTORIES = ("local-dir:", "hf-hub:")  # before names of which timm makes a model by a config.json

# Keys that transformers writes into every configuration, or wrote until its version 5.
_OF_TRANSFORMERS = """
architectures auto_map model_type transformers_version torch_dtype dtype _name_or_path id2label label2id
_attn_implementation_autoset output_attentions output_hidden_states return_dict torchscript use_bfloat16
tf_legacy_loss pruned_heads tie_word_embeddings chunk_size_feed_forward is_encoder_decoder is_decoder
cross_attention_hidden_size add_cross_attention tie_encoder_decoder max_length min_length do_sample
early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix
finetuning_task tokenizer_class bos_token_id pad_token_id eos_token_id sep_token_id problem_type
decoder_start_token_id task_specific_params transformers.js_config initializer_factor initializer_range
"""
# About the text half, training, or how the same numbers are computed.
_JINA_HARMLESS = """
vision_config text_config projection_dim matryoshka_dimensions logit_scale_init_value use_text_flash_attn
use_vision_xformers trilith_clip
"""
_JINA_VISION_HARMLESS = "patch_dropout drop_path_rate fused_layer_norm x_attention"
# Properties of every EVA02 tower that a file may contradict.
_JINA_VISION_FIXED: dict[str, tuple[Any, ...]] = {
    "rope_embeddings": (True,),
    "naive_swiglu": (True,),
    "qkv_bias": (True,),
    "post_norm": (False, None),
    "ls_init_value": (None, 0, 0.0),
    "proj_type": (None,),
}
# The remote code's defaults.
_JINA_VISION_DEFAULTS = dict.fromkeys(("rope_embeddings", "naive_swiglu", "subln", "intp_freq"), False)
_CROP_MODES = {"shortest": "center", "squash": "squash"}
_KERNELS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
_PROCESSOR_HARMLESS = {"auto_map", "image_processor_type", "processor_class", "feature_extractor_type"}
_PROCESSOR_HARMLESS |= {"do_convert_rgb", "use_fast", "_valid_processor_keys"}
# Of fast image processors: their device and order of axes.
_PROCESSOR_HARMLESS |= {"data_format", "default_to_square", "device", "disable_grouping", "input_data_format"}
_PROCESSOR_HARMLESS |= {"return_tensors", "size_divisor", "pad_size"}


def _check(found: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], known: set[str], where: str) -> None:
    """Raises ValueError if a key of `fixed` has none of its values, and for an unknown key."""
    for key, allowed in fixed.items():
        if key in found and not any(type(found[key]) is type(value) and found[key] == value for value in allowed):
            raise ValueError(f"{where} has {key} {found[key]!r}, and a VisionTower is made for {allowed[0]!r}")
    if unknown := sorted(key for key in found.keys() - known - fixed.keys() if found[key] is not None):
        raise ValueError(f"{where} has {', '.join(unknown)}, not known here; remove what has no bearing on images")


def _object(values: Mapping[str, Any], key: str, source: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = field(values, key, OBJECT, source, {})
    return found


def jina_settings(values: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The image tower's settings in a jina-clip config.json. (A wrong width, depth or patch shows when the weights are
    loaded.)

    Raises:
        ValueError: a value that no tower has, or an unknown key; the message names it.
    """
    vision = _object(values, "vision_config", source)
    if values.get("vision_config") is not None:
        said = {key: value for key, value in vision.items() if value is not None or key not in _JINA_VISION_DEFAULTS}
        vision = _JINA_VISION_DEFAULTS | said
    top = {"add_projections": (False, None), "truncate_dim": (None,)}
    _check(values, top, set((_OF_TRANSFORMERS + _JINA_HARMLESS).split()), str(source))
    # The position table does not tell the image's size if pixels are left over: 512 is 36 patches of 14.
    names = {"width": "width", "layers": "layers", "patch_size": "patch", "image_size": "resolution"}
    read = {*names, "head_width", "embed_dim", "intp_freq", "pt_hw_seq_len", "subln", "mlp_ratio"}
    known = set((_OF_TRANSFORMERS + _JINA_VISION_HARMLESS).split()) | read
    _check(vision, _JINA_VISION_FIXED, known, f"{source}: vision_config")
    for name in (*names, "head_width", "embed_dim", "pt_hw_seq_len"):
        value = vision.get(name, 1)
        if not COUNT.fits(value):
            raise ValueError(f"{source}: vision_config's {name} is {shown(value)}; expected a positive integer")
    for name, kind in (("intp_freq", FLAG), ("subln", FLAG), ("mlp_ratio", NUMBER)):
        field(vision, name, kind, f"{source}: vision_config", None)
    found: dict[str, Any] = {ours: vision[theirs] for theirs, ours in names.items() if theirs in vision}
    if vision.get("embed_dim", vision.get("width")) != vision.get("width"):
        raise ValueError(
            f"{source}: vision_config's embed_dim is {vision['embed_dim']} and its width {vision.get('width')}: a "
            "projection follows its tower, and a VisionTower has none"
        )
    if "width" in vision and "head_width" in vision:
        found["heads"], rest = divmod(vision["width"], vision["head_width"])
        if rest:
            raise ValueError(f"{source}: width {vision['width']} is no multiple of head_width {vision['head_width']}")
    if "intp_freq" in vision:
        found["reference_grid"] = vision.get("pt_hw_seq_len", 16) if vision["intp_freq"] else None
    # Positions that are not rescaled fit one grid only.
    patches = vision.get("image_size", 224) // vision.get("patch_size", 16)
    reference = vision.get("pt_hw_seq_len", 16)
    if vision.get("intp_freq") is False and reference != patches:
        raise ValueError(
            f"{source}: vision_config's pt_hw_seq_len is {reference} and intp_freq False, which fits no "
            f"image of {patches} by {patches} patches"
        )
    if "subln" in vision:
        found["attention_norm"] = vision["subln"]
    if "width" in vision and vision.get("mlp_ratio") is not None:
        found["mlp_width"] = int(vision["width"] * vision["mlp_ratio"])
        found["mlp_ratio"] = vision["mlp_ratio"]
    # What a jina-clip directory of ours says beside the published keys.
    ours = _object(_object(values, "trilith_clip", source), "vision", source)
    _check(ours, {}, {"checkpointing", "mlp_ratio"}, f"{source}: trilith_clip.vision")
    return found | dict(ours)


def open_clip_settings(
    values: Mapping[str, Any], source: Path, beside: Mapping[str, Any], *, num_classes: int | None
) -> dict[str, Any]:
    """Shape and preprocessing in an open_clip_config.json whose image tower is timm's.

    Args:
        values: its content.
        beside: that of config.json, which has the shape if the tower is made from a directory and not by a timm name.

    Raises:
        ValueError: another kind of tower, or an unknown key.
    """
    model, vision = _object(values, "model_cfg", source), {}
    if model:  # open_clip's own defaults are towers that average patches, and a projection
        vision = {"timm_pool": "avg", "timm_proj": "linear", **_object(model, "vision_cfg", source)}
    name = vision.get("timm_model_name")
    if not isinstance(name, str):
        raise ValueError(
            f"{source}: vision_cfg names no timm_model_name; name the file of weights itself, to infer the shape"
        )
    of_text = {"text_cfg", "multimodal_cfg", "custom_text", "quick_gelu", "embed_dim", "vision_cfg", "output_dict"}
    scales = {"init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "cast_dtype"}
    _check(values, {}, {"model_cfg", "preprocess_cfg"}, str(source))
    _check(model, {}, of_text | scales, f"{source}: model_cfg")
    read = {"timm_model_name", "image_size", "timm_model_pretrained", "timm_drop", "timm_drop_path", "patch_dropout"}
    fixed = {"timm_pool": ("token",), "timm_proj": (None, "", "none")}
    _check(vision, fixed, read | {"timm_proj_bias", "output_tokens"}, f"{source}: vision_cfg")
    dims = field(model, "embed_dim", COUNT, f"{source}: model_cfg", 0)
    head = 0 if vision.get("timm_proj") == "none" else dims
    if name.startswith(_DIRECTORIES):
        if "architecture" not in beside:
            raise ValueError(
                f"{source} makes the image tower from {name!r}; put the config.json from there beside it, since "
                "nothing is fetched for it here"
            )
        if head:
            raise ValueError(f"{source}: vision_cfg has a projection after {name!r}, and expected is timm_proj 'none'")
        timms = {key: value for key, value in beside.items() if key in DIRECTORY_KEYS}  # the others are of the texts
        shape = directory_config(timms, source.with_name("config.json"), num_classes=num_classes, global_pool=None)
        found = asdict(shape) | {key: getattr(VisionTowerConfig, key) for key in PREPROCESSING}  # open_clip has its own
    else:
        made = meta_model(name, {"num_classes": head, "global_pool": "token"}, source)
        found = asdict(config_of(made, name, {}, num_classes=num_classes, global_pool=None))
    stated = {"size": vision.get("image_size"), **_object(values, "preprocess_cfg", source)}
    return {**found, **_preprocessing(stated, f"{source}: preprocess_cfg", crop_mode=None)}


def processor_settings(directory: Path, *, crop_mode: str | None) -> dict[str, Any]:
    """Sizes and normalisation in a preprocessor_config.json, jina-clip's or CLIPImageProcessor's; {} if there is none.

    (CLIPImageProcessor's own resizing may round differently in places.)

    Raises:
        ValueError: a step that a tower does not do, or an unknown key.
    """
    path = directory / PROCESSOR_NAME
    if not path.is_file():
        return {}
    values = read_json(path)
    where = str(path)
    steps = {f"do_{step}": (True,) for step in ("resize", "center_crop", "rescale", "normalize")}
    rest = {key: _said(value) for key, value in values.items() if key not in steps and key not in _PROCESSOR_HARMLESS}
    _check({key: value for key, value in values.items() if key in steps}, steps, set(), where)
    _check({"do_pad": rest.pop("do_pad", None)}, {"do_pad": (False, None)}, set(), where)
    rest = {key: value for key, value in rest.items() if value is not None}
    factor = rest.pop("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"{where} has rescale_factor {factor!r}, and here pixels are divided by 255")
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in rest:
            rest[ours] = rest.pop(theirs)
    if "resample" in rest:
        number = rest.pop("resample")
        rest["interpolation"] = _KERNELS[number] if number in range(len(_KERNELS)) else number
    size, crop = rest.get("size"), rest.pop("crop_size", None)
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        rest["size"] = size["shortest_edge"]
    elif isinstance(size, Mapping):
        rest["size"], rest["resize_mode"] = size, "squash"
    found = _preprocessing(rest, where, crop_mode=crop_mode)
    if crop is not None and "resolution" in found:
        target, whole = _pixels(crop, f"{where}: crop_size"), found["resolution"]
        if target == whole:
            return found | {"crop_pct": 1.0}
        if isinstance(target, tuple) or isinstance(whole, tuple) or target > whole:
            raise ValueError(f"{where} has size {size!r} and crop_size {crop!r}; expected squares, the crop within")
        found |= {"resolution": target, "crop_pct": _crop_pct(target, whole)}
    return found


def processor_values(config: VisionTowerConfig) -> dict[str, Any] | None:
    """preprocessor_config.json of a tower, for transformers' CLIPImageProcessor.

    With `backend="pil"` its pixels are the tower's, but for the place of the crop: of a surplus of 4n + 3 pixels it
    cuts one less at the left or top. Its torchvision backend resizes by another kernel. None if it cannot bring images
    to size as the tower does, with a border or a rectangle that is cut out: transformers then takes timm's own steps,
    which want RGB images.
    """
    height, width = as_pair(config.resolution)
    whole = [math.floor(side / config.crop_pct) for side in (height, width)]
    square = height == width
    if config.crop_mode == "border" or not (square or (config.crop_mode == "squash" and whole == [height, width])):
        return None
    sides = {"height": whole[0], "width": whole[1]}
    return {
        "image_processor_type": PROCESSOR_TYPE,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": sides if config.crop_mode == "squash" else {"shortest_edge": whole[0]},
        "resample": _KERNELS.index(config.interpolation),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def _crop_pct(target: int, whole: int) -> float:
    """The share from which `preprocess`, rounding down, computes `whole`."""
    share = target / whole
    return share if math.floor(target / share) == whole else math.nextafter(share, 0)


def _said(value: Any) -> Any:
    """A size without the sides that are null."""
    return {key: side for key, side in value.items() if side is not None} if isinstance(value, Mapping) else value


def _preprocessing(values: Mapping[str, Any], where: str, *, crop_mode: str | None) -> dict[str, Any]:
    """From open_clip's terms, which jina-clip shares; `crop_mode` is the caller's, instead of resize_mode."""
    read = {"size", "mean", "std", "interpolation", "resize_mode", "fill_color"}
    _check(values, {"mode": ("RGB",)}, read, where)
    found = {key: values[key] for key in ("mean", "std", "interpolation") if values.get(key) is not None}
    if values.get("size") is not None:
        found["resolution"] = _pixels(values["size"], f"{where}: size")
    mode = field(values, "resize_mode", TEXT, where, None) or "shortest"
    if mode not in _CROP_MODES and crop_mode is None:
        raise ValueError(
            f"{where} has resize_mode {mode!r} with fill_color {values.get('fill_color', 0)!r}; a VisionTower can "
            f"{' or '.join(_CROP_MODES)}: state crop_mode='center', 'squash' or 'border' to have that instead"
        )
    found["crop_mode"] = crop_mode or _CROP_MODES[mode]
    return found


def _pixels(size: Any, name: str) -> int | tuple[int, int]:
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")]
    sides = list(size) if isinstance(size, Sequence) and not isinstance(size, str) else [size, size]
    if len(sides) != 2 or not all(map(COUNT.fits, sides)):
        raise ValueError(f"{name} is {size!r}; expected pixels, or height and width")
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def timm_keys(config: VisionTowerConfig, *, with_processor: bool) -> dict[str, Any]:
    """The keys of config.json that timm reads, and transformers' wrapper of timm's models."""
    arguments = config.timm_arguments()
    return {
        "architectures": ["TimmWrapperModel"],
        "model_type": "timm_wrapper",
        "architecture": TIMM_ENTRY,
        "num_classes": arguments.pop("num_classes"),
        "num_features": config.width,
        "do_pooling": True,
        # Of a local timm directory AutoImageProcessor reads this file first, of one on a hub the processor's own.
        **({"image_processor_type": PROCESSOR_TYPE} if with_processor else {}),
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, *as_pair(config.resolution)],
            **{name: getattr(config, name) for name in PREPROCESSING},
            "num_classes": 0,
        },
    }
