"""open_clip_config.json, what it says of a text tower of transformers: each key is followed or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from text_tower.config import TextTowerConfig
from text_tower.fields import COUNT, OBJECT, TEXT, field, shown
from text_tower.files import read_json
from text_tower.st_folder import MAX_LENGTH

CONFIG_FILE = "open_clip_config.json"
STEMS = ("open_clip_model", "open_clip_pytorch_model")
"""Of its files of weights, safetensors and pickles."""
# Of text_cfg: where the tower and the tokenizer are from, and what open_clip takes from there.
_PLACES = ("hf_model_name", "hf_tokenizer_name")
_HARMLESS = {"hf_model_pretrained", "vocab_size"}
# open_clip's defaults, and the only values with which its vectors are the tower's.
_DEFAULTS = {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp", "context_length": 77}
_ONLY: dict[str, tuple[Any, ...]] = {
    "hf_pooler_type": ("mean_pooler", None),
    "hf_proj_type": (None,),
    "tokenizer_mode": (None, ""),
    "tokenizer_kwargs": (None, {}),
    "output_tokens": (False, None),
}


class OpenClip(NamedTuple):
    """What such a directory says of its text tower.

    Attributes:
        context_length: tokens to which open_clip cuts and pads a text.
    """

    context_length: int

    def applied(self, config: TextTowerConfig) -> TextTowerConfig:
        """A configuration that cuts where open_clip cuts; one that would be cut there anyhow stays as it is."""
        if self.context_length == min(MAX_LENGTH, config.max_length):
            return config
        return replace(config, max_length=min(self.context_length, config.max_length))


def read(folder: Path) -> OpenClip | None:
    """What open_clip_config.json says; None of a directory that is not open_clip's. Nothing is read from other places
    that it names.

    Raises:
        FileNotFoundError: config.json is not beside it.
        ValueError: another kind of text tower than transformers' jina_embeddings_v3 with a mean over tokens, or a key
            that is not known.
    """
    file = folder / CONFIG_FILE
    weights = [folder / f"{STEMS[0]}.safetensors", folder / f"{STEMS[1]}.bin"]
    if not file.is_file() or not any(path.is_file() for path in weights):
        return None
    model = field(read_json(file), "model_cfg", OBJECT, file)
    where = f"{file}: text_cfg"
    text = _DEFAULTS | field(model, "text_cfg", OBJECT, f"{file}: model_cfg")
    for key in _PLACES:
        if not field(text, key, TEXT, where, ""):
            raise ValueError(f"{where} names no {key}: its text tower is open_clip's own, and no TextTower")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{where} makes the text tower from {shown(text['hf_model_name'])}; put the config.json and the tokenizer "
            f"from there into {folder}, since nothing is fetched for it here"
        )
    for key, allowed in _ONLY.items():
        if key in text and text[key] not in allowed:
            raise ValueError(f"{where} has {key} {shown(text[key])}; a TextTower knows {allowed[0]!r} only")
    if unknown := sorted(k for k in text.keys() - _ONLY.keys() - _HARMLESS - {*_PLACES, "context_length"}):
        raise ValueError(f"{where} has {', '.join(unknown)}, not known here; remove what has no bearing on texts")
    if model.get("multimodal_cfg") is not None:
        raise ValueError(f"{file} has a multimodal_cfg, a decoder of texts, which no tower here is")
    return OpenClip(field(text, "context_length", COUNT, where))
