"""config.json of JinaBERT: jina-embeddings-v2's, and the text half of jina-clip-v1's.

The code of jina-embeddings-v2 is on the hub (jinaai/jina-bert-implementation): transformers needs `trust_remote_code`,
and without it takes `model_type` "bert" for another model. That of jina-clip-v1's text half is another (`FLASH`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from text_tower.config import TextTowerConfig
from text_tower.config_json import COMMON, OUR_KEY, OURS, PROJECTOR, checked, of_us, ours_of
from text_tower.config_keys import CLIP_KEY, check_keys_of
from text_tower.fields import COUNT, NUMBER, OBJECT, TEXT_OF_NAME, field
from text_tower.layouts import Layout

_CODE = "jinaai/jina-bert-implementation--"
FLASH = "jinaai/jina-bert-flash-implementation"
_NAMES_OF_FLASH = (FLASH, "jinaai/jina-bert-v2-base-en-flash")
# Of its config.json, from which jina-clip-v1 makes its text half: what differs is stated.
FLASH_CONFIG = {
    "vocab_size": 30528, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "layer_norm_eps": 1e-12, "pad_token_id": 0, "type_vocab_size": 2,
}  # fmt: skip
JINA_BERT = {"positions": "alibi", "mlp": "geglu"}
_SHAPE = {**COMMON, "token_types": "type_vocab_size"}
_IN_CLIP = ("dropout", "checkpointing", "truncate_dim", "instructions", "max_length")


def from_json(stored: dict[str, Any], weights: Mapping[str, Tensor], layout: Layout, file: Path) -> TextTowerConfig:
    """As `config_json.from_json`, of weights that are named as JinaBERT's.

    Raises:
        ValueError: another kind of model, or settings that this tower does not have.
    """
    wanted = "jina_clip" if layout.is_half else "bert"
    if (kind := stored.get("model_type")) != wanted:
        raise ValueError(
            f"{file} has model_type {kind!r}, but the weights are named as in {layout}; expected {wanted!r}"
        )
    if layout.is_half:
        return _from_clip(stored, weights, layout, file)
    check_keys_of(stored, "jina-bert", file)
    # Without them it is another model: BERT's own positions, its MLP.
    for key, value in (("position_embedding_type", "alibi"), ("feed_forward_type", "geglu")):
        if stored.get(key) != value:
            raise ValueError(f"{file} has {key} {stored.get(key)!r}; expected {value!r}, as jina-embeddings-v2-base")
    if missing := sorted(theirs for theirs in _SHAPE.values() if theirs not in stored):
        raise ValueError(f"{file} lacks {missing}")
    values: dict[str, Any] = {ours: field(stored, theirs, NUMBER, file) for ours, theirs in _SHAPE.items()}
    values |= {**JINA_BERT, "max_length": field(stored, "max_position_embeddings", COUNT, file, 8192)}
    values["truncate_dim"] = stored.get("truncate_dim")
    ours = ours_of(stored, file)
    if unknown := sorted(ours.keys() - {*OURS, *PROJECTOR}):
        raise ValueError(f"{file} has unknown keys {unknown} under {OUR_KEY!r}")
    return checked({**values, **ours}, file)


def _from_clip(stored: dict[str, Any], weights: Mapping[str, Tensor], layout: Layout, file: Path) -> TextTowerConfig:
    """From jina-clip-v1, whose config.json leaves the text half's shape to another repository: the weights give it."""
    text = field(stored, "text_config", OBJECT, file)
    options = field(text, "hf_model_config_kwargs", OBJECT, f"{file}: text_config", {})
    check_keys_of(stored, "jina_clip, jina-bert", file)
    named = text.get("hf_model_name_or_path")
    if named not in _NAMES_OF_FLASH:
        raise ValueError(
            f"{file} has text_config.hf_model_name_or_path {named!r}, but weights named as in {layout}; expected "
            f"{FLASH!r}"
        )
    shapes = {name.removeprefix(layout.prefix): list(tensor.shape) for name, tensor in weights.items()}
    word, types, gated = (
        shapes.get(name, [])
        for name in (
            "embeddings.word_embeddings.weight",
            "embeddings.token_type_embeddings.weight",
            "encoder.layers.0.mlp.gated_layers.weight",
        )
    )
    if not len(word) == len(types) == len(gated) == 2:
        raise ValueError(f"{file.parent} has no {layout.prefix}embeddings or first block to tell a shape")
    numbers = [match[1] for name in shapes if (match := re.match(r"encoder\.layers\.(\d{1,6})\.", name))]
    of_weights = {
        "vocab_size": word[0],
        "hidden_size": word[1],
        "num_hidden_layers": 1 + max(map(int, numbers)),
        "intermediate_size": gated[0] // 2,
        "type_vocab_size": types[0],
    }
    for key, found in of_weights.items():
        if options.get(key, found) != found:
            raise ValueError(f"{file} has {key} {options[key]!r}, but the weights {found!r}")
    if (dim := text.get("embed_dim", word[1])) != word[1]:
        raise ValueError(f"{file} has text_config.embed_dim {dim}, but the weights are {word[1]} wide")
    stated = {**FLASH_CONFIG, **options, **of_weights}
    where = f"{file}: text_config.hf_model_config_kwargs"
    values: dict[str, Any] = {ours: field(stated, theirs, NUMBER, where) for ours, theirs in _SHAPE.items()}
    return checked({**values, **JINA_BERT, **_ours_in_clip(stored, file)}, file)


def _ours_in_clip(stored: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What a jina-clip directory of ours says beside the published keys."""
    ours: dict[str, Any] = field(field(stored, CLIP_KEY, OBJECT, file, {}), "text", OBJECT, f"{file}: {CLIP_KEY}", {})
    where = f"{file}: {CLIP_KEY}.text"
    if unknown := sorted(ours.keys() - set(_IN_CLIP)):
        raise ValueError(f"{where} has {', '.join(unknown)}, not known there; remove it, or export the model again")
    return {**ours, "instructions": field(ours, "instructions", TEXT_OF_NAME, where, {})}


def clip_options(config: TextTowerConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`hf_model_config_kwargs`, what belongs under `trilith_clip.text`) of a text half in jina-clip-v1's layout."""
    shape = {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()}
    options = {"use_flash_attn": False, **{key: value for key, value in shape.items() if value != FLASH_CONFIG[key]}}
    defaults = TextTowerConfig()
    ours = {key: getattr(config, key) for key in _IN_CLIP if getattr(config, key) != getattr(defaults, key)}
    return options, ours


def to_json(config: TextTowerConfig, dtype: str, architecture: str, tokenizer: str | None) -> dict[str, Any]:
    """config.json as jina-embeddings-v2-base has it, with ours; arguments as of `config_json.to_json`."""
    ours = asdict(config)
    return {
        "architectures": [architecture],
        "auto_map": {
            "AutoConfig": f"{_CODE}configuration_bert.JinaBertConfig",
            "AutoModel": f"{_CODE}modeling_bert.JinaBertModel",
        },
        "model_type": "bert",
        **{theirs: ours[name] for name, theirs in _SHAPE.items()},
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "position_embedding_type": "alibi",
        "feed_forward_type": "geglu",
        "emb_pooler": "mean",
        "max_position_embeddings": config.max_length,
        "torch_dtype": dtype,
        OUR_KEY: of_us(config, tokenizer),
    }
