"""The tower's configuration as config.json files tell it, those of transformers and those of jina's remote code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from text_tower.config import TextTowerConfig
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
OURS = ("dropout", "lora_rank", "lora_alpha", "adapters", "instructions", "checkpointing")
_UNUSED_POSITIONS = 2  # max_position_embeddings counts two positions that XLM-RoBERTa never used


def from_json(stored: dict[str, Any], weights: Mapping[str, Tensor], layout: Layout, file: Path) -> TextTowerConfig:
    """The configuration in `stored`, the content of `file`; `weights` and `layout` tell what it leaves unsaid.

    Raises:
        ValueError: another kind of model, or one that this tower cannot be.
    """
    kind = stored.get("model_type")
    if kind not in ("jina_embeddings_v3", "xlm-roberta", "jina_clip"):
        raise ValueError(f"{file} has model_type {kind!r}; expected 'jina_embeddings_v3', 'xlm-roberta' or 'jina_clip'")
    # Jina's remote code calls itself XLM-RoBERTa too, but for its positions.
    rotary = kind != "xlm-roberta" or stored.get("position_embedding_type") == "rotary"
    if (kind == "jina_clip") != layout.is_half or rotary != (layout.kind != "xlm-r"):
        raise ValueError(f"{file} says {kind!r}, but the weights are named as in {layout}; expected them to agree")
    if kind == "jina_clip":
        return _from_clip(stored, weights, layout, file)
    missing = sorted(theirs for theirs in COMMON.values() if theirs not in stored)
    if missing:
        raise ValueError(f"{file} lacks {missing}")
    rope = stored.get("rope_parameters") or {}
    for key, found, expected in (
        ("hidden_act", stored.get("hidden_act", "gelu"), "gelu"),
        ("type_vocab_size", stored.get("type_vocab_size", 1), 1),
        ("rope_type", rope.get("rope_type", "default"), "default"),
    ):
        if found != expected:
            raise ValueError(f"{file} has {key} {found!r}; this tower knows {expected!r} only")
    values: dict[str, Any] = {ours: stored[theirs] for ours, theirs in COMMON.items()}
    if kind == "jina_embeddings_v3":
        values["rope_theta"] = rope.get("rope_theta", 20000.0)
    elif rotary:
        values["rope_theta"] = stored.get("rotary_emb_base", 10000.0)  # the remote code's default
    if "max_position_embeddings" in stored:
        values["max_length"] = stored["max_position_embeddings"] - _UNUSED_POSITIONS
    if layout.kind == "remote-code":
        values |= _remote_adapters(stored, file)
    elif stored.get("task_instructions"):
        values["instructions"] = stored["task_instructions"]
    values |= stored.get(OUR_KEY, {})
    if not set(values) <= (known := {f.name for f in fields(TextTowerConfig)}):
        raise ValueError(f"{file} has unknown keys {sorted(set(values) - known)} under {OUR_KEY!r}")
    return TextTowerConfig(**values)


def _from_clip(stored: dict[str, Any], weights: Mapping[str, Tensor], layout: Layout, file: Path) -> TextTowerConfig:
    """jina-clip-v2's config.json leaves the text half's shape to another repository: the weights tell it."""
    text = stored.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{file} has no text_config; expected jina-clip-v2's config.json")
    shapes = {name.removeprefix(layout.prefix).replace(".parametrizations.weight.original", ".weight"): list(t.shape)
              for name, t in weights.items()}  # fmt: skip
    word, fc1 = (shapes.get(n) for n in ("embeddings.word_embeddings.weight", "encoder.layers.0.mlp.fc1.weight"))
    if word is None or fc1 is None:
        raise ValueError(
            f"{file.parent} has no {layout.prefix}embeddings.word_embeddings or first block to tell a shape"
        )
    vocab_size, width = word
    options = text.get("hf_model_config_kwargs") or {}
    return TextTowerConfig(
        vocab_size=vocab_size,
        width=width,
        layers=1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("encoder.layers.")),
        heads=max(1, width // 64),  # XLM-RoBERTa's, in every size
        mlp_width=fc1[0],
        rope_theta=options.get("rotary_emb_base", 20000.0),  # jina-embeddings-v3's
        **(_remote_adapters(options, file) if layout.kind == "remote-code" else {}),
    )


def _remote_adapters(options: dict[str, Any], file: Path) -> dict[str, Any]:
    if not options.get("lora_adaptations"):
        raise ValueError(f"{file} names no lora_adaptations, but the weights hold adapters; expected their names")
    return {
        "adapters": tuple(options["lora_adaptations"]),
        "lora_rank": options.get("lora_rank", 4),
        "lora_alpha": options.get("lora_alpha", 1),
        "instructions": options.get("task_instructions") or {},
    }


def to_json(config: TextTowerConfig, dtype: str, architecture: str = "JinaEmbeddingsV3Model") -> dict[str, Any]:
    """config.json for transformers and for us."""
    ours = asdict(config)
    return {
        "architectures": [architecture],
        "model_type": "jina_embeddings_v3",
        **_shared(ours),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": dtype,
        OUR_KEY: {name: ours[name] for name in OURS},
    }


def to_remote_json(config: TextTowerConfig, dtype: str) -> dict[str, Any]:
    """config.json for jina's remote code, which fetches itself from the hub when transformers is told to trust it."""
    code = "jinaai/xlm-roberta-flash-implementation--"
    model = "modeling_lora.XLMRobertaLoRA" if config.adapters else "modeling_xlm_roberta.XLMRobertaModel"
    adapters = {
        "load_trained_adapters": True,
        "lora_adaptations": list(config.adapters),
        "lora_alpha": config.lora_alpha,
        "lora_dropout_p": 0.0,
        "lora_main_params_trainable": False,
        "lora_rank": config.lora_rank,
        # Theirs wants exactly one instruction for each adapter.
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
