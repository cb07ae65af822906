"""sentence-transformers' files of a directory: a Router sends texts to `text/` and images to `vision/`, without code of
ours (`sentence_transformers/base/modules/router.py`, 6.2).

Its own way of cutting vectors is after the Normalize module: at a smaller `truncate_dim` they have length one only with
`normalize_embeddings=True`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage_trainer.dual_encoder import TEXT, VISION

if TYPE_CHECKING:
    from text_tower import TextTowerConfig

_MODULES = "sentence_transformers.base.modules"
_TRANSFORMER = f"{_MODULES}.transformer.Transformer"
_DENSE = f"{_MODULES}.dense.Dense"
_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"


def write(directory: Path, config: TextTowerConfig) -> None:
    """Adds sentence-transformers' files to a directory whose `text/` and `vision/` the towers have written.

    Args:
        config: of the text tower; its instructions become prompts.
    """
    from text_tower.files import write_json
    from text_tower.projector import denses
    from text_tower.st_folder import model_settings

    pooling = f"{TEXT}/1_Pooling"
    projector = [f"{TEXT}/{dense.folder}" for dense in denses(config)]
    normalize = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    files: dict[str, Any] = {
        "modules.json": _then_normalize(f"{_MODULES}.router.Router"),
        "router_config.json": {
            "types": {TEXT: _TRANSFORMER, pooling: _POOLING, **dict.fromkeys(projector, _DENSE), VISION: _TRANSFORMER},
            "structure": {"text": [TEXT, pooling, *projector], "image": [VISION]},
            "parameters": {
                "default_route": "text",
                "allow_empty_key": True,
                # It reads the keys back as Python, and drops one that it cannot read.
                "route_mappings": {str((None, "text")): "text", str((None, "image")): "image"},
            },
        },
        "1_Normalize/config.json": normalize,
        "config_sentence_transformers.json": model_settings(config),
        # By itself, without modules.json, it would average the patches.
        f"{VISION}/modules.json": _then_normalize(_TRANSFORMER),
        f"{VISION}/sentence_bert_config.json": _of_images(directory / VISION),
        f"{VISION}/1_Normalize/config.json": normalize,
    }
    for place in (directory, directory / VISION):
        (place / "1_Normalize").mkdir()
    for name, content in files.items():
        write_json(content, directory / name)


def _then_normalize(first: str) -> list[dict[str, Any]]:
    """modules.json of a module, whose files are beside it, and of Normalize."""
    return [
        {"idx": 0, "name": "0", "path": "", "type": first},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": f"{_MODULES}.normalize.Normalize"},
    ]


def _of_images(vision: Path) -> dict[str, Any]:
    """The vector is the class token, timm's own pooling; nothing pools after it."""
    how = {"method": "forward", "method_output_name": "pooler_output"}
    # Pillow resizes as the tower does, torchvision with another kernel.
    pillow = {"processor_kwargs": {"backend": "pil"}} if (vision / "preprocessor_config.json").exists() else {}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": how},
        "module_output_name": "sentence_embedding",
        **pillow,
    }
