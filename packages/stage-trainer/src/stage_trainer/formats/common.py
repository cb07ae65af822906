"""One directory that is ours, sentence-transformers', transformers' and timm's at once.

    README.md                                              the model card (`formats.card`)
    config.json                                            ours: temperatures and Matryoshka dims
    modules.json, router_config.json, 1_Normalize/, …      sentence-transformers' (`formats.sentence_transformers`)
    text/                                                  ours, transformers' (jina_embeddings_v3), and alone
                                                           sentence-transformers' too
    vision/                                                ours, timm's, transformers' (timm_wrapper)

Each tower has one file of weights, `model.safetensors` in its folder, which all of them read: there is nothing to link,
and an upload to a hub keeps it so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.files import whole_directory
from stage_trainer.formats import sentence_transformers

if TYPE_CHECKING:
    from text_tower import TextTower, TextTowerConfig, Tokenizer


_ALONE = "; `--format trilith` writes it for stage_trainer.DualEncoder alone"


class Adapters(NamedTuple):
    """What became of the text tower's LoRA adapters, by name: added to the weights, kept beside them as PEFT folders,
    or left out."""

    merged: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def write(model: DualEncoder, out: Path, lora: str, card: Callable[[Adapters], str]) -> Adapters:
    """Writes the directory, completely or not at all.

    Args:
        model: a tower is replaced if an adapter is merged into it; an image tower's always is.
        lora: "merged" adds the text tower's default adapter to its weights, for good. "kept" leaves the weights without
            it and writes each adapter as a PEFT folder, `text/NAME`; such a directory is not sentence-transformers',
            which would encode with the bare weights and say nothing.
        card: gives README.md, from what became of the adapters.

    Raises:
        UserError: `out` exists, the disk is full, or the model cannot be said in one of the formats.
    """
    check(model)
    names = model.text.config.adapters
    adapters = Adapters(merged=names[:1], left_out=names[1:]) if lora == "merged" else Adapters(kept=names)
    if adapters.merged:
        model.text = model.text.merged()
    model.vision = model.vision.merged()
    with whole_directory(out) as directory:
        model.write_into(directory, layout="peft" if adapters.kept else "transformers", apart=True)
        if not adapters.kept:
            sentence_transformers.write(directory, model.text.config, model.vision.config)
        (directory / "README.md").write_text(card(adapters), encoding="utf-8")
    return adapters


def check(model: DualEncoder) -> None:
    """That every format can say what the model is.

    Raises:
        UserError: it names what one of them cannot say, and what to do.
    """
    check_rotary(model.text.config)
    check_tokenizer(model.text)
    vision = model.vision.config
    if vision.layer_norm_eps != type(vision).layer_norm_eps:
        raise UserError(
            f"the image tower's layer_norm_eps is {vision.layer_norm_eps:g}, and timm's EVA02 models, which "
            f"transformers and sentence-transformers use too, always take {type(vision).layer_norm_eps:g}{_ALONE}"
        )


def check_rotary(config: TextTowerConfig) -> None:
    """UserError for JinaBERT, which no library has without code of its own from a hub."""
    if config.positions != "rotary":
        raise UserError(
            f"the text tower is JinaBERT (positions {config.positions}), which transformers, sentence-transformers and "
            "open_clip do not have; use --format jina-clip-v1, or onnx, whose graphs hold it"
        )


def check_tokenizer(text: TextTower) -> Tokenizer:
    """The tokenizer, or UserError if there is none or it is of another model."""
    tokenizer = text.tokenizer
    if tokenizer is None:
        raise UserError(f"the text tower has no tokenizer, and no library can encode a text without one{_ALONE}")
    if not tokenizer.fits(text.config.vocab_size):
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the text tower {text.config.vocab_size}: they are of "
            "different models. Put the tokenizer with which the model was trained into its text/ folder"
        )
    return tokenizer
