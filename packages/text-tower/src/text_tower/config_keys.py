"""The known keys of a config.json: applied, without influence, or allowed only with the value that this tower has.

A key in none of the tables is refused by name: its influence is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Keys that `config_json` turns into fields of `TextTowerConfig`.
_SHAPE = frozenset([
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "layer_norm_eps", "pad_token_id", "max_position_embeddings", "model_type", "truncate_dim",
    "task_instructions", "trilith",
])  # fmt: skip
_ROPE = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"})
_ADAPTERS = frozenset({"lora_adaptations", "lora_rank", "lora_alpha", "rotary_emb_base"})

# Keys without influence on embeddings: origin, storage, training, heads, generation, bookkeeping.
_HARMLESS = frozenset([
    "_name_or_path", "name_or_path", "_commit_hash", "architectures", "transformers_version", "torch_dtype",
    "dtype", "auto_map", "tokenizer_class", "finetuning_task", "task_specific_params", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "classifier_dropout", "initializer_range", "initializer_factor",
    "gradient_checkpointing", "use_cache", "tie_word_embeddings", "output_hidden_states", "output_attentions",
    "return_dict", "use_return_dict", "output_past", "torchscript", "chunk_size_feed_forward",
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "attn_implementation", "_experts_implementation_internal", "id2label", "label2id", "num_labels",
    "_num_labels", "problem_type", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id",
    "mask_token_id", "decoder_start_token_id", "max_length", "min_length", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "prefix", "tf_legacy_loss", "tie_encoder_decoder", "use_bfloat16",
    "export_model_type",
])  # fmt: skip
# Of jina's remote code: kernels, training of adapters, Matryoshka prefixes.
_HARMLESS_REMOTE = frozenset([
    "use_flash_attn", "fused_mlp", "fused_bias_fc", "fused_dropout_add_ln", "use_xentropy", "use_reentrant",
    "mlp_checkpoint_lvl", "lora_dropout_p", "lora_main_params_trainable", "load_trained_adapters",
    "matryoshka_dimensions",
])  # fmt: skip
# Allowed only with these values, or null.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "type_vocab_size": (1,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "quantization_config": (),
}
_ONLY_REMOTE: dict[str, tuple[Any, ...]] = {
    "rotary_emb_scale_base": (),
    "rotary_emb_interleaved": (False,),
    "window_size": ([-1, -1],),
    "use_qk_norm": (False,),
    "emb_pooler": ("mean",),
    "pad_vocab_size_multiple": (1,),
    "last_layer_subset": (False,),
    "dense_seq_output": (False, True),
}
CLIP_KEY = "trilith_clip"  # of a whole jina-clip directory that we wrote: what the published keys have no place for
_ONLY_CLIP: dict[str, tuple[Any, ...]] = {"add_projections": (False,), "truncate_dim": ()}
_HARMLESS_CLIP = frozenset([
    "vision_config", "text_config", "logit_scale_init_value", "projection_dim", "matryoshka_dimensions",
    "use_text_flash_attn", "use_vision_xformers", "transformers.js_config", CLIP_KEY,
])  # fmt: skip
_ONLY_CLIP_TEXT: dict[str, tuple[Any, ...]] = {
    "pooler_type": ("mean_pooler",),
    "proj_type": (),
    "proj_bias": (False,),
    "default_instruction_task": (),
}
_HARMLESS_CLIP_TEXT = frozenset({"embed_dim", "hf_model_name_or_path", "default_lora_task", "hf_model_config_kwargs"})
# Of open_clip's config.json, which both towers share: timm's keys, and what gives the configuration another name.
_HARMLESS_OPEN_CLIP = frozenset([
    "architecture", "num_classes", "num_features", "do_pooling", "image_processor_type", "model_args", "pretrained_cfg",
    CLIP_KEY,
])  # fmt: skip
OPEN_CLIP_RENAMES: dict[str, Any] = {
    "attribute_map": {"open_clip_model_type": "model_type"},  # before the next key, which it renames
    "open_clip_model_type": "xlm-roberta",
}


def check_keys_of(stored: Mapping[str, Any], kind: str, file: Path) -> None:
    """That a config.json says nothing that a tower would ignore.

    Args:
        stored: its content; of jina-clip `text_config` and its `hf_model_config_kwargs` too.
        kind: "native" (transformers' jina_embeddings_v3), "open-clip" (the same beside an image tower's), "xlm-r",
            "remote-code" or "jina_clip".

    Raises:
        ValueError: an unknown key, or a value that this tower does not have; all are named.
    """
    known = _SHAPE | _HARMLESS
    if kind in ("native", "open-clip"):
        only = {"position_embedding_type": ("rotary",), "head_dim": (_head_dim(stored),), "attention_bias": (True,)}
        if kind == "open-clip":
            known |= _HARMLESS_OPEN_CLIP
            only |= {key: (value,) for key, value in OPEN_CLIP_RENAMES.items()}
        _refuse(stored, known | _ROPE | _HARMLESS_REMOTE, {**_ONLY, **only}, file)
    elif kind == "xlm-r":
        _refuse(stored, known, {**_ONLY, "position_embedding_type": ("absolute",)}, file)
    elif kind == "remote-code":
        _refuse(stored, known | _ADAPTERS | _HARMLESS_REMOTE, _remote(stored), file)
    else:
        shared, text = _HARMLESS | {"model_type", "pad_token_id"}, stored["text_config"]
        _refuse(stored, shared | _HARMLESS_CLIP, _ONLY | _ONLY_CLIP, file)
        _refuse(text, shared | _HARMLESS_CLIP_TEXT, _ONLY | _ONLY_CLIP_TEXT, file, "text_config.")
        options = text.get("hf_model_config_kwargs") or {}
        where = "text_config.hf_model_config_kwargs."
        _refuse(options, known | _ADAPTERS | _HARMLESS_REMOTE, _remote(options), file, where)


def _remote(stored: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    only = {"position_embedding_type": ("rotary",), "rotary_emb_dim": (_head_dim(stored),)}
    return _ONLY | _ONLY_REMOTE | only


def _head_dim(stored: Mapping[str, Any]) -> int | None:
    width, heads = stored.get("hidden_size"), stored.get("num_attention_heads")
    return width // heads if isinstance(width, int) and isinstance(heads, int) and width and heads else None


def _refuse(
    stored: Mapping[str, Any], known: frozenset[str], only: Mapping[str, tuple[Any, ...]], file: Path, where: str = ""
) -> None:
    for key, values in only.items():
        found = stored.get(key)
        if found is not None and found not in values:
            expected = " or ".join(map(repr, values)) if values else "null"
            raise ValueError(f"{file} has {where}{key} {found!r}; this tower knows {expected} only")
    if unknown := sorted(k for k in stored.keys() - known - only.keys() if stored[k] is not None):
        named = ", ".join(f"{where}{key} {stored[key]!r}" for key in unknown)
        raise ValueError(
            f"{file} has {named}, of which this tower does not know what it means; if embeddings do not depend on it, "
            "remove it from the file"
        )
