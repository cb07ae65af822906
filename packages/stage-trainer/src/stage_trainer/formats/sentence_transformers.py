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
    from vision_tower import VisionTowerConfig

_MODULES = "sentence_transformers.base.modules"
_TRANSFORMER = f"{_MODULES}.transformer.Transformer"
_DENSE = f"{_MODULES}.dense.Dense"
_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"


def write(directory: Path, config: TextTowerConfig, vision: VisionTowerConfig) -> None:
    """Adds sentence-transformers' files to a directory whose `text/` and `vision/` the towers have written.

    Args:
        config: of the text tower; its instructions become prompts.
        vision: of the image tower.
    """
    from text_tower.files import write_json
    from text_tower.projector import denses
    from text_tower.st_folder import model_settings
    from vision_tower import projector as of_images

    pooling = f"{TEXT}/1_Pooling"
    projector = [f"{TEXT}/{dense.folder}" for dense in denses(config)]
    products = [dense.folder for dense in of_images.denses(vision)]
    projector_of_images = [f"{VISION}/{folder}" for folder in products]
    normalize = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    files: dict[str, Any] = {
        "modules.json": _then_normalize(f"{_MODULES}.router.Router"),
        "router_config.json": {
            "types": {
                TEXT: _TRANSFORMER,
                pooling: _POOLING,
                VISION: _TRANSFORMER,
                **dict.fromkeys([*projector, *projector_of_images], _DENSE),
            },
            "structure": {"text": [TEXT, pooling, *projector], "image": [VISION, *projector_of_images]},
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
        f"{VISION}/modules.json": _then_normalize(_TRANSFORMER, *products),
        f"{VISION}/sentence_bert_config.json": _of_images(directory / VISION),
        f"{VISION}/1_Normalize/config.json": normalize,
    }
    for place in (directory, directory / VISION):
        (place / "1_Normalize").mkdir()
    for name, content in files.items():
        write_json(content, directory / name)


def _then_normalize(first: str, *products: str) -> list[dict[str, Any]]:
    """modules.json of a module, whose files are beside it, of a projector's products in their folders, and of
    Normalize."""
    kinds = {"": first, **dict.fromkeys(products, _DENSE), "1_Normalize": f"{_MODULES}.normalize.Normalize"}
    return [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds.items())]


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
