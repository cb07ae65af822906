"""`--format jina-clip-v1`: a model as a directory in exactly the layout of the published jina-clip-v1.

As `formats.jina_clip`, with JinaBERT for a text tower: no adapters, no instructions, weights in float32. The published
code is the same one, and what it has no words for stands in config.json under `trilith_clip`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from text_tower import TextTower
from text_tower.files import write_json, write_weights
from text_tower.jina_bert import FLASH, clip_options

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.files import whole_directory
from stage_trainer.formats.common import Adapters
from stage_trainer.formats.jina_clip import (
    DTYPES,
    Written,
    cast,
    check_fits,
    for_sentence_transformers,
    processor_json,
    shared_json,
    write_tokenizer,
)
from stage_trainer.formats.jina_clip_v1_layout import NAME, tensors


def write(
    model: DualEncoder,
    out: str | Path,
    *,
    lora: str = "merged",
    dtype: str = "float32",
    card: Callable[[Adapters], str] | None = None,
) -> Written:
    """Writes a model's directory, whole or not at all.

    Args:
        out: a directory that does not exist.
        lora: "merged": the text tower's first adapter is added to the weights; the layout has no adapters.
        dtype: of all tensors; the published one is "float32".
        card: gives README.md, from what became of the adapters; without it there is none.

    Raises:
        UserError: `out` exists, or the layout has no place for something that the model is; the message names it.
    """
    adapters = model.text.config.adapters
    if model.text.config.positions != "alibi":
        raise UserError(f"the text tower is a rotary XLM-RoBERTa, and {NAME}'s is JinaBERT; use --format jina-clip")
    if adapters and lora == "kept":
        raise UserError(f"{NAME}'s layout has no adapters; with --lora merged {adapters[0]} is added to the weights")
    check_fits(model.text.config, model.vision.config, NAME)
    if model.vision.config.reference_grid is not None:
        raise UserError(
            f"the vision tower has reference_grid {model.vision.config.reference_grid}, and {NAME}'s rotary positions "
            "are those of its own grid, as they are; a tower that is trained with reference_grid null can be exported"
        )
    text = model.text.merged() if adapters else model.text
    model.vision = model.vision.merged()
    if text.tokenizer is None:
        raise UserError("the text tower has no tokenizer, which the directory needs; set model.text.tokenizer")
    if text.tokenizer.pad != text.config.pad_id:
        raise UserError(
            f"the text tower's pad_id is {text.config.pad_id}, and its tokenizer pads with {text.tokenizer.pad}; the "
            "published code takes the one out of the mean, the other is what it gets"
        )
    weights, rounded = cast(tensors(text, model.vision, model.logit_scale.detach()), DTYPES[dtype])
    with whole_directory(out) as directory:
        write_weights(weights, directory / "model.safetensors")
        write_json(config_json(model, text, "", dtype), directory / "config.json")
        write_json(processor_json(model.vision.config), directory / "preprocessor_config.json")
        write_tokenizer(text.tokenizer, directory)
        for file, content in for_sentence_transformers(text.config, "2_Normalize").items():
            write_json(content, directory / file)
        if card is not None:
            become = Adapters(merged=adapters[:1], left_out=adapters[1:])
            (directory / "README.md").write_text(card(become), encoding="utf-8")
    return Written(next(iter(adapters), None), adapters[1:], tuple(rounded))


def config_json(model: DualEncoder, text: TextTower, name: str, dtype: str) -> dict[str, Any]:
    """config.json; arguments as of `jina_clip.config_json`. (`name` is of no use: there are no adapters.)"""
    options, ours = clip_options(text.config)
    text_config = {"hf_model_config_kwargs": options, "hf_model_name_or_path": FLASH}
    dims = {"matryoshka_dimensions": list(model.matryoshka_dims)} if model.matryoshka_dims else {}
    return {**shared_json(model, text_config, ours, dtype), **dims}
