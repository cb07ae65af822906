"""config.json to the tower's configuration and back, in the forms of transformers and of jina's remote code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from text_tower.config import TextTowerConfig
from text_tower.config_keys import CLIP_KEY, check_keys_of
from text_tower.fields import COUNT, NUMBER, OBJECT, TEXT, TEXT_OF_NAME, TEXTS, field
from text_tower.layouts import Layout

# Our field -> the name in config.json that transformers knows; the other fields stand under OUR_KEY.
COMMON = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
    "pad_id": "pad_token_id",
}
OUR_KEY = "trilith"
TOKENIZER_KEY = "tokenizer_fingerprint"
OURS = ("dropout", "lora_rank", "lora_alpha", "adapters", "instructions", "truncate_dim", "checkpointing")
PROJECTOR = ("projector", "projector_hidden")  # stated where there is one
_V3 = "jinaai/jina-embeddings-v3"
_UNUSED_POSITIONS = 2  # max_position_embeddings counts two positions that XLM-RoBERTa never used


def from_json(stored: dict[str, Any], weights: Mapping[str, Tensor], layout: Layout, file: Path) -> TextTowerConfig:
    """The configuration in `stored`, the content of `file`; `weights` and `layout` complete it.

    Raises:
        ValueError: another kind of model, or settings that this tower does not have.
    """
    kind = stored.get("model_type")
    if kind not in ("jina_embeddings_v3", "xlm-roberta", "jina_clip"):
        raise ValueError(f"{file} has model_type {kind!r}; expected 'jina_embeddings_v3', 'xlm-roberta' or 'jina_clip'")
    # Jina's remote code has XLM-RoBERTa's model_type too, with other positions.
    rotary = kind != "xlm-roberta" or stored.get("position_embedding_type") == "rotary"
    if (kind == "jina_clip") != layout.is_half or rotary != (layout.kind != "xlm-r"):
        raise ValueError(f"{file} says {kind!r}, but the weights are named as in {layout}; expected them to agree")
    if kind == "jina_clip":
        return _from_clip(stored, weights, layout, file)
    missing = sorted(theirs for theirs in COMMON.values() if theirs not in stored)
    if missing:
        raise ValueError(f"{file} lacks {missing}")
    native = kind == "jina_embeddings_v3"
    with_images = "open-clip" if layout.kind == "open-clip" else "native"
    check_keys_of(stored, with_images if native else "remote-code" if rotary else "xlm-r", file)
    values: dict[str, Any] = {ours: field(stored, theirs, NUMBER, file) for ours, theirs in COMMON.items()}
    if native:
        values["rope_theta"] = _rope_theta(stored, file)
    elif rotary:
        values["rope_theta"] = stored.get("rotary_emb_base", 10000.0)  # the remote code's default
    values |= _max_length(stored, file)
    values["truncate_dim"] = stored.get("truncate_dim")
    if layout.kind == "remote-code":
        values |= _remote_adapters(stored, file)
    else:
        values["instructions"] = field(stored, "task_instructions", TEXT_OF_NAME, file, {})
    values |= ours_of(stored, file)
    if not set(values) <= (known := {f.name for f in fields(TextTowerConfig)}):
        raise ValueError(f"{file} has unknown keys {sorted(set(values) - known)} under {OUR_KEY!r}")
    return checked(values, file)


def ours_of(stored: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What `to_json` put under OUR_KEY, or nothing.

    Raises:
        ValueError: no object.
    """
    ours: dict[str, Any] = field(stored, OUR_KEY, OBJECT, file, {})
    return {name: value for name, value in ours.items() if name != TOKENIZER_KEY}


def tokenizer_of(stored: Mapping[str, Any], file: Path) -> str | None:
    """`Tokenizer.fingerprint` of the one that was saved with the weights, if the file says it."""
    found: str | None = field(field(stored, OUR_KEY, OBJECT, file, {}), TOKENIZER_KEY, TEXT, file, None)
    return found


def _max_length(stored: Mapping[str, Any], file: Path) -> dict[str, Any]:
    if (key := "max_position_embeddings") not in stored:
        return {}
    return {"max_length": field(stored, key, COUNT, file) - _UNUSED_POSITIONS}


def checked(values: dict[str, Any], file: Path) -> TextTowerConfig:
    """The configuration, or ValueError that names the file."""
    try:
        return TextTowerConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _rope_theta(stored: dict[str, Any], file: Path) -> float:
    """The rotary base as transformers 5 reads it: `rope_scaling`, the older name, before `rope_parameters`, and the top
    level if neither has it."""
    rope = field(stored, "rope_scaling", OBJECT, file, {}) or field(stored, "rope_parameters", OBJECT, file, {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", stored.get("partial_rotary_factor"))
    for key, found, expected in (("rope_type", kind, "default"), ("partial_rotary_factor", part or 1.0, 1.0)):
        if found != expected:
            raise ValueError(f"{file} has {key} {found!r}; this tower knows {expected!r} only")
    if unknown := sorted(rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
        raise ValueError(f"{file} has {unknown} among its rotary settings; this tower knows rope_theta only")
    theta: float = field(rope, "rope_theta", NUMBER, file, field(stored, "rope_theta", NUMBER, file, 20000.0))
    return theta


def _from_clip(stored: dict[str, Any], weights: Mapping[str, Tensor], layout: Layout, file: Path) -> TextTowerConfig:
    """From jina-clip-v2, whose config.json leaves the text half's shape to another repository: the weights give it."""
    text = field(stored, "text_config", OBJECT, file)
    shapes = {name.removeprefix(layout.prefix).replace(".parametrizations.weight.original", ".weight"): list(t.shape)
              for name, t in weights.items()}  # fmt: skip
    word, fc1 = (shapes.get(n) for n in ("embeddings.word_embeddings.weight", "encoder.layers.0.mlp.fc1.weight"))
    numbers = [match[1] for name in shapes if (match := re.match(r"encoder\.layers\.(\d{1,6})\.", name))]
    if word is None or fc1 is None or not (len(word) == len(fc1) == 2):
        raise ValueError(
            f"{file.parent} has no {layout.prefix}embeddings.word_embeddings or first block to tell a shape"
        )
    options = field(text, "hf_model_config_kwargs", OBJECT, f"{file}: text_config", {})
    check_keys_of(stored, "jina_clip", file)
    vocab_size, width = word
    if "rotary_emb_base" not in options and text.get("hf_model_name_or_path") != _V3:
        raise ValueError(
            f"{file} does not say the rotary base of its text half, nor that it is {_V3}'s; expected "
            "text_config.hf_model_config_kwargs.rotary_emb_base"
        )
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "width": width,
        "layers": 1 + max(map(int, numbers)),
        "heads": max(1, width // 64),  # XLM-RoBERTa's, in every size
        "mlp_width": fc1[0],
    }
    for ours, theirs in COMMON.items():
        if theirs in options and options[theirs] != values.get(ours, options[theirs]) and ours != "heads":
            raise ValueError(f"{file} has {theirs} {options[theirs]!r}, but the weights {values[ours]!r}")
        if theirs in options:
            values[ours] = options[theirs]
    if (dim := text.get("embed_dim", width)) != width:
        raise ValueError(f"{file} has text_config.embed_dim {dim}, but the weights are {width} wide")
    values |= _max_length(options, file)
    if layout.kind == "remote-code":
        values |= _remote_adapters(options, file)
        first, default = values["adapters"][0], text.get("default_lora_task")
        if default not in (None, first):
            raise ValueError(f"{file} has default_lora_task {default!r}; the adapter in use is the first, {first!r}")
    else:
        values["instructions"] = field(options, "task_instructions", TEXT_OF_NAME, file, {})
    values["rope_theta"] = options.get("rotary_emb_base", 20000.0)  # jina-embeddings-v3's
    values["truncate_dim"] = options.get("truncate_dim")
    return checked(values | _ours_in_clip(stored, values, file), file)


def _ours_in_clip(stored: Mapping[str, Any], values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What a jina-clip directory of ours says beside the published keys: what those have no place for, and by an empty
    list of adapters that they are merged already."""
    ours: dict[str, Any] = field(field(stored, CLIP_KEY, OBJECT, file, {}), "text", OBJECT, f"{file}: {CLIP_KEY}", {})
    where = f"{file}: {CLIP_KEY}.text"
    of_adapters = {"lora_rank"} if "adapters" in ours else {"lora_rank", "lora_alpha"}
    if unknown := sorted(ours.keys() - (set(OURS) - of_adapters)):
        raise ValueError(f"{where} has {', '.join(unknown)}, not known there; remove it, or export the model again")
    if ours.get("adapters", []) != []:
        raise ValueError(f"{where} has adapters {ours['adapters']!r}; expected an empty list: merged adapters")
    instructions = field(ours, "instructions", TEXT_OF_NAME, where, values["instructions"])
    if other := sorted(t for t, text in values["instructions"].items() if text and instructions.get(t) != text):
        raise ValueError(f"{where} has another instruction of {other[0]!r} than task_instructions; make them agree")
    return {**ours, **({"adapters": (), "lora_rank": 0} if "adapters" in ours else {})}


def _remote_adapters(options: dict[str, Any], file: Path) -> dict[str, Any]:
    names = field(options, "lora_adaptations", TEXTS, file, [])
    if not names:
        raise ValueError(f"{file} names no lora_adaptations, but the weights hold adapters; expected their names")
    return {
        "adapters": tuple(names),
        "lora_rank": options.get("lora_rank", 4),
        "lora_alpha": options.get("lora_alpha", 1),
        "instructions": field(options, "task_instructions", TEXT_OF_NAME, file, {}),
    }


def of_us(config: TextTowerConfig, tokenizer: str | None) -> dict[str, Any]:
    """What stands under OUR_KEY."""
    names = (*OURS, *(PROJECTOR if config.projector else ()))
    ours = asdict(config)
    return {**{name: ours[name] for name in names}, **({TOKENIZER_KEY: tokenizer} if tokenizer else {})}


def to_json(config: TextTowerConfig, dtype: str, architecture: str, tokenizer: str | None) -> dict[str, Any]:
    """config.json for transformers and for us; `tokenizer` is the fingerprint of the one that is saved with it."""
    ours = asdict(config)
    return {
        "architectures": [architecture],
        "model_type": "jina_embeddings_v3",
        **_shared(ours),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": dtype,
        OUR_KEY: of_us(config, tokenizer),
    }


def to_remote_json(config: TextTowerConfig, dtype: str) -> dict[str, Any]:
    """config.json for jina's remote code, which transformers fetches from the hub with `trust_remote_code`."""
    code = "jinaai/xlm-roberta-flash-implementation--"
    model = "modeling_lora.XLMRobertaLoRA" if config.adapters else "modeling_xlm_roberta.XLMRobertaModel"
    adapters = {
        "load_trained_adapters": True,
        "lora_adaptations": list(config.adapters),
        "lora_alpha": config.lora_alpha,
        "lora_dropout_p": 0.0,
        "lora_main_params_trainable": False,
        "lora_rank": config.lora_rank,
        # It requires exactly one instruction for each adapter.
        "task_instructions": {name: config.instructions.get(name, "") for name in config.adapters},
    }
    return {
        "architectures": [model.rpartition(".")[2]],
        "auto_map": {
            "AutoConfig": f"{code}configuration_xlm_roberta.XLMRobertaFlashConfig",
            "AutoModel": f"{code}{model}",
        },
        "model_type": "xlm-roberta",
        **_shared(asdict(config)),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "position_embedding_type": "rotary",
        "rotary_emb_base": config.rope_theta,
        "truncate_dim": config.truncate_dim,
        "torch_dtype": dtype,
        **(adapters if config.adapters else {}),
    }


def _shared(ours: dict[str, Any]) -> dict[str, Any]:
    return {
        **{theirs: ours[name] for name, theirs in COMMON.items()},
        "bos_token_id": 0,
        "eos_token_id": 2,
        "type_vocab_size": 1,
        "hidden_act": "gelu",
        "max_position_embeddings": ours["max_length"] + _UNUSED_POSITIONS,
    }
