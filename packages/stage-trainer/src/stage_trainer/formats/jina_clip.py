"""`--format jina-clip`: a model as a directory in exactly the layout of the published jina-clip-v2.

Its weights are read by the published code (`AutoModel.from_pretrained(…, trust_remote_code=True)`, transformers below
5), by what is built on that code, and by `DualEncoder.from_pretrained`. What a model has beyond the published keys,
such as the text task's own temperature, stands in config.json under `trilith_clip`, which others ignore.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from text_tower import TextTower, TextTowerConfig, Tokenizer
from text_tower.config_json import COMMON
from text_tower.config_keys import CLIP_KEY
from text_tower.files import write_json, write_weights
from text_tower.tokenizer_files import JSON_FILE, SENTENCEPIECE_FILE
from torch import Tensor
from vision_tower import VisionTowerConfig

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.files import whole_directory
from stage_trainer.formats.common import Adapters, check_rotary
from stage_trainer.formats.jina_clip_layout import TASK, tensors, with_an_adapter
from stage_trainer.formats.jina_clip_read import MODEL_TYPE
from stage_trainer.formats.parts import BIASES

PROCESSOR = "JinaCLIPProcessor"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_CODE = "jinaai/jina-clip-implementation--"
_V3 = "jinaai/jina-embeddings-v3"
# Of its config.json, from which the published code makes the text half: what differs is stated.
_V3_CONFIG = {
    "vocab_size": 250002, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "layer_norm_eps": 1e-5, "pad_token_id": 1, "max_position_embeddings": 8194,
}  # fmt: skip
_RESIZE_MODES = {"center": "shortest", "squash": "squash"}


class Written(NamedTuple):
    """What became of the model.

    Attributes:
        merged: the adapter that is now part of the weights; None if none was merged.
        left_out: adapters that are not in the directory.
        rounded: names of tensors that the directory's dtype does not hold exactly.
    """

    merged: str | None
    left_out: tuple[str, ...]
    rounded: tuple[str, ...]


def write(
    model: DualEncoder,
    out: str | Path,
    *,
    lora: str = "kept",
    dtype: str = "float16",
    card: Callable[[Adapters], str] | None = None,
) -> Written:
    """Writes a model's directory, whole or not at all.

    Args:
        out: a directory that does not exist.
        lora: "kept": the text tower's adapter stays apart; "merged": the first one is added to the weights, and zeros
            take its place, so that nobody applies it again. config.json says which.
        dtype: of all tensors, one of `DTYPES`. The published one is "float16"; weights that it does not hold exactly
            are rounded.
        card: gives README.md, from what became of the adapters; without it there is none.

    Raises:
        UserError: `out` exists, or the layout has no place for something that the model is; the message names it.
    """
    adapters = model.text.config.adapters
    if lora == "kept" and len(adapters) > 1:
        raise UserError(
            f"the text tower has the adapters {', '.join(adapters)}, and jina-clip-v2's layout one, which is always "
            f"on; with --lora merged {adapters[0]} is added to the weights, and the others are left out"
        )
    check_rotary(model.text.config)
    check_fits(model.text.config, model.vision.config)
    merge = lora == "merged" and bool(adapters)
    model.vision = model.vision.merged()  # the layout has no adapters of images
    text = model.text.merged() if merge else model.text
    if text.tokenizer is None:
        raise UserError("the text tower has no tokenizer, which the directory needs; set model.text.tokenizer")
    name = adapters[0] if adapters else TASK
    weights, rounded = cast(tensors(text, model.vision, model.logit_scale.detach()), DTYPES[dtype])
    with whole_directory(out) as directory:
        write_weights(weights, directory / "model.safetensors")
        write_json(config_json(model, text, name, dtype), directory / "config.json")
        write_json(processor_json(model.vision.config), directory / "preprocessor_config.json")
        write_tokenizer(text.tokenizer, directory)
        for file, content in for_sentence_transformers(text.config, "1_Normalize").items():
            write_json(content, directory / file)
        if card is not None:
            left_out, kept = (adapters[1:] if merge else ()), (() if merge else adapters)
            become = Adapters(merged=adapters[:1] if merge else (), kept=kept, left_out=left_out)
            (directory / "README.md").write_text(card(become), encoding="utf-8")
    return Written(adapters[0] if merge else None, adapters[1:] if merge else (), tuple(rounded))


def cast(weights: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in another dtype, and the names of those that changed."""
    result, rounded = {}, []
    for name, tensor in weights.items():
        made = result[name] = tensor.to(dtype)
        if tensor.is_meta or torch.equal(made.to(tensor.dtype), tensor):
            continue
        if not bool(made.isfinite().all()):
            raise UserError(
                f"{name} has values up to {float(tensor.abs().max()):g}, which {str(dtype).removeprefix('torch.')} "
                "does not hold; use --dtype float32, or train on: weights that large, or no numbers, are a fault"
            )
        rounded.append(name)
    return result, rounded


def misfits(config: VisionTowerConfig) -> dict[str, str]:
    """What the published code has as a constant, or no word for: field -> what it knows."""
    fixed = {"rope_theta": 10_000.0, "layer_norm_eps": 1e-6, "crop_pct": 1.0}
    wrong = {key: f"{value:g}" for key, value in fixed.items() if getattr(config, key) != value}
    rows, columns = config.grid
    if not isinstance(config.resolution, int) and config.resolution[0] != config.resolution[1]:
        wrong["resolution"] = f"a square, and {rows}x{columns} patches"
    if config.crop_mode not in _RESIZE_MODES:
        wrong["crop_mode"] = " or ".join(_RESIZE_MODES)
    if config.interpolation not in ("bicubic", "bilinear"):
        wrong["interpolation"] = "bicubic or bilinear"
    return wrong


def check_fits(text: TextTowerConfig, vision: VisionTowerConfig, layout: str = "jina-clip-v2") -> None:
    """UserError for an image tower or a projector that the published code cannot be."""
    for name, projector in (("image", vision.projector), ("text", text.projector)):
        if projector:
            raise UserError(
                f"the {name} tower has a projector, for which {layout}'s layout has no place; export it in another "
                "format"
            )
    for key, expected in misfits(vision).items():
        raise UserError(
            f"the vision tower has {key} {getattr(vision, key)}, and {layout}'s layout knows {expected} only; "
            "export it in another format"
        )


def config_json(model: DualEncoder, text: TextTower, name: str, dtype: str) -> dict[str, Any]:
    """config.json; `name` is the adapter's, real or of zeros."""
    text_config = {
        "default_instruction_task": None,
        "default_lora_task": name,
        "hf_model_config_kwargs": _text_options(text.config, name),
        "hf_model_name_or_path": _V3,
    }
    # Published beside weights in float16: the dtype in which the published code computes on GPUs.
    computed_in = "bfloat16" if dtype == "float16" else dtype
    return {
        **shared_json(model, text_config, _text_of_ours(text.config, name), computed_in),
        "matryoshka_dimensions": list(model.matryoshka_dims) if model.matryoshka_dims else None,
        "transformers.js_config": {"use_external_data_format": {"model.onnx": True}},
        "truncate_dim": None,
    }


def shared_json(
    model: DualEncoder, text_config: dict[str, Any], ours: dict[str, Any], computed_in: str
) -> dict[str, Any]:
    """The keys of config.json that jina-clip-v1 and -v2 share; `ours` is what only we say of the text tower."""
    width = model.text.config.output_width
    of_us = _ours(model, ours)
    return {
        "add_projections": False,
        "architectures": ["JinaCLIPModel"],
        "auto_map": {
            "AutoConfig": f"{_CODE}configuration_clip.JinaCLIPConfig",
            "AutoModel": f"{_CODE}modeling_clip.JinaCLIPModel",
        },
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": MODEL_TYPE,
        "projection_dim": width,
        "text_config": {
            **text_config,
            "embed_dim": width,
            "model_type": "jina_clip_text",
            "pooler_type": "mean_pooler",
            "proj_bias": False,
            "proj_type": None,
        },
        "torch_dtype": computed_in,
        "use_text_flash_attn": None,
        "use_vision_xformers": None,
        "vision_config": _vision_config(model.vision.config),
        **({CLIP_KEY: of_us} if of_us else {}),
    }


def _text_options(config: TextTowerConfig, name: str) -> dict[str, Any]:
    """What the published code changes in jina-embeddings-v3's configuration.

    The rotary base is always stated: a copy of that code that starts from its own defaults would take 10,000.
    """
    adapted = with_an_adapter(config)
    shape = {theirs: getattr(config, ours) for ours, theirs in COMMON.items()}
    shape["max_position_embeddings"] = config.max_length + 2
    return {
        "load_trained_adapters": False,
        "lora_adaptations": [name],
        "lora_alpha": adapted.lora_alpha,
        "lora_dropout_p": 0.0,
        "lora_main_params_trainable": False,
        "lora_rank": adapted.lora_rank,
        "task_instructions": _task_instructions(config, name),
        "use_flash_attn": True,
        "rotary_emb_base": config.rope_theta,
        **{key: value for key, value in shape.items() if value != _V3_CONFIG[key]},
    }


def _task_instructions(config: TextTowerConfig, name: str) -> dict[str, str]:
    """The published code wants exactly one for each adapter."""
    return {name: config.instructions.get(name, "")}


def _prompts(config: TextTowerConfig) -> dict[str, str]:
    """Every instruction, as sentence-transformers' prompts: also those of tasks that have no adapter."""
    return {task: text for task, text in config.instructions.items() if text}


def _text_of_ours(config: TextTowerConfig, name: str) -> dict[str, Any]:
    text: dict[str, Any] = {} if config.adapters else {"adapters": [], "lora_alpha": config.lora_alpha}
    if {**_task_instructions(config, name), **_prompts(config)} != config.instructions:
        text["instructions"] = dict(config.instructions)
    defaults = TextTowerConfig()
    for key in ("dropout", "checkpointing", "truncate_dim"):
        if getattr(config, key) != getattr(defaults, key):
            text[key] = getattr(config, key)
    return text


def _ours(model: DualEncoder, text: dict[str, Any]) -> dict[str, Any]:
    """What the other keys do not say; nothing for the published model."""
    vision: dict[str, Any] = {}
    of_vision = model.vision.config
    if of_vision.checkpointing:
        vision["checkpointing"] = True
    if _vision_config(of_vision)["mlp_ratio"] != of_vision.mlp_ratio:
        vision["mlp_ratio"] = of_vision.mlp_ratio
    return {**scalars(model), **({"text": text} if text else {}), **({"vision": vision} if vision else {})}


def scalars(model: DualEncoder) -> dict[str, float]:
    """The text task's own temperature and a sigmoid loss's biases, if there are such."""
    found = {}
    if (scale := float(model.text_logit_scale.detach())) != float(model.logit_scale.detach()):
        found["text_logit_scale"] = scale
    return found | {name: float(bias.detach()) for name in BIASES if (bias := getattr(model, name)) is not None}


def _vision_config(config: VisionTowerConfig) -> dict[str, Any]:
    fits = int(config.width * config.mlp_ratio) == config.mlp_width
    side = config.resolution if isinstance(config.resolution, int) else config.resolution[0]
    return {
        "embed_dim": config.width,
        "fused_layer_norm": False,
        "head_width": config.head_dim,
        "image_size": side,
        "intp_freq": config.reference_grid is not None,
        "layers": config.layers,
        "ls_init_value": None,
        # Their code rounds the product down; the half keeps it from landing one below.
        "mlp_ratio": config.mlp_ratio if fits else (config.mlp_width + 0.5) / config.width,
        "model_type": "jina_clip_vision",
        "naive_swiglu": True,
        "patch_dropout": 0.1,
        "patch_size": config.patch,
        "post_norm": False,
        "proj_type": None,
        "pt_hw_seq_len": config.reference_grid or config.grid[0],
        "qkv_bias": True,
        "rope_embeddings": True,
        "subln": config.attention_norm,
        "width": config.width,
        "x_attention": True,
    }


def processor_json(config: VisionTowerConfig) -> dict[str, Any]:
    """preprocessor_config.json of a tower that `misfits` finds nothing of."""
    return {
        "auto_map": {
            "AutoImageProcessor": f"{_CODE}processing_clip.JinaCLIPImageProcessor",
            "AutoProcessor": f"{_CODE}processing_clip.JinaCLIPProcessor",
        },
        "fill_color": 0,
        "image_processor_type": "JinaCLIPImageProcessor",
        "interpolation": config.interpolation,
        "mean": list(config.mean),
        "processor_class": PROCESSOR,
        "resize_mode": _RESIZE_MODES[config.crop_mode],
        "size": _vision_config(config)["image_size"],
        "std": list(config.std),
    }


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json and the settings beside it; the published code has no sentencepiece.

    Raises:
        UserError: tokenizer.json cannot say what the tokenizer's own file does.
    """
    tokenizer.save_for_others(directory)
    (directory / SENTENCEPIECE_FILE).unlink(missing_ok=True)
    if Tokenizer.from_file(directory).pieces() != tokenizer.pieces():
        raise UserError(f"the tokenizer cannot be written as {JSON_FILE} with the same ids; give the model one that is")


def for_sentence_transformers(config: TextTowerConfig, folder: str) -> dict[str, Any]:
    """Its files, as published: modules of remote code, of which the second is in `folder`, and the prompts."""
    normalize = "sentence_transformers.models.Normalize"
    modules = [
        {"idx": 0, "name": "transformer", "path": "", "type": "custom_st.Transformer"},
        {"idx": int(folder[0]), "name": "normalizer", "path": folder, "type": normalize},
    ]
    settings = {
        "__version__": {"sentence_transformers": "3.3.0", "transformers": "4.46.2", "pytorch": "2.2.2"},
        "prompts": _prompts(config),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    return {"modules.json": modules, "config_sentence_transformers.json": settings}
