"""Models of open_clip, sentence-transformers and transformers, for a column beside ours. No code of a model is run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from stage_trainer.errors import UserError
from stage_trainer.evaluation.models import BATCH, Asked, Embedder, device_of, instruction
from stage_trainer.files import fingerprint_of
from stage_trainer.formats.jina_clip_read import MODEL_TYPE
from stage_trainer.recipe.limits import MAX_PIXELS

OPEN_CLIP = "open_clip:"
"""Before ARCHITECTURE/PRETRAINED, a name of open_clip's own list."""
_LIBRARIES = {"open_clip": "open_clip_torch", "sentence_transformers": "sentence-transformers"}


def library_of(folder: Path) -> str | None:
    """Whose model a folder holds: "open_clip", "sentence_transformers" or "transformers"; None for ours."""
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        config = {}
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or str(config.get("format", "")).startswith("trilith") or kind == MODEL_TYPE:
        return None
    if (folder / "modules.json").is_file():
        return "sentence_transformers"
    return "transformers" if isinstance(kind, str) else None


def load(name: str, folder: Path | None, library: str, asked: Asked) -> Embedder:
    """A model of another library.

    Args:
        name: of its column; without a folder it is `open_clip:ARCHITECTURE/PRETRAINED`.

    Raises:
        UserError: the library is not installed, or cannot load it.
    """
    if library != "transformers" and find_spec(library) is None:
        way = "pip install './packages/stage-trainer[models]'"
        raise UserError(f"{name} needs {_LIBRARIES[library]}, which is not installed: {way}")
    try:
        if library == "open_clip":
            return OpenClip(name, folder, asked)
        if library == "transformers" and folder is not None and _pairs(folder):
            return Transformers(name, folder, asked)
        assert folder is not None
        return SentenceTransformers(name, folder, asked)
    except UserError:
        raise
    except Exception as error:  # whatever another library raises at a folder that it does not take
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{library} cannot load {folder or name}: {first}") from error


class OpenClip(Embedder):
    """A model of open_clip, in float32 on CPUs and under bfloat16 autocast on GPUs, as ours."""

    def __init__(self, name: str, folder: Path | None, asked: Asked):
        import open_clip

        self.device = device_of(asked)
        if folder is not None:
            called, pretrained = f"local-dir:{folder}", None
        else:
            called, _, pretrained = name.removeprefix(OPEN_CLIP).rpartition("/")
            if (called, pretrained) not in open_clip.list_pretrained():
                raise UserError(
                    f"{name}: open_clip has no such model; expected {OPEN_CLIP}ARCHITECTURE/PRETRAINED, as "
                    "`open_clip.list_pretrained()` lists them, for example open_clip:ViT-B-32/openai"
                )
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(called, pretrained=pretrained)
        self.model.eval().to(self.device)
        self.tokenizer = open_clip.get_tokenizer(called)
        self.name, self.sees = name, True
        self.fingerprint = fingerprint_of(folder) if folder else _of_tensors(self.model.state_dict())
        self._max_pixels = asked.max_pixels or MAX_PIXELS
        self.dims = (self._texts(["width"], False).shape[1],)
        self.settings = {
            "max_length": f"{getattr(self.tokenizer, 'context_length', None) or self.model.context_length} (its own)",
            "instruction of queries": instruction(asked, None),
            "library": f"open_clip {open_clip.__version__}",
            "computes in": "bfloat16" if self.device == "cuda" else "float32",
        }

    def _texts(self, texts: Sequence[str], query: bool) -> np.ndarray:
        return self._run(texts, lambda part: self.model.encode_text(self.tokenizer(list(part)).to(self.device)))

    def _images(self, images: Sequence[bytes]) -> np.ndarray:
        import torch

        def embed(part: Sequence[bytes]) -> Any:
            pixels = [self.preprocess(_picture(image, self._max_pixels)) for image in part]
            return self.model.encode_image(torch.stack(pixels).to(self.device))

        return self._run(images, embed)

    def _run(self, items: Sequence[Any], embed: Any) -> np.ndarray:
        return _in_batches(items, embed, self.device)


class SentenceTransformers(Embedder):
    """A folder of sentence-transformers, or a text tower of transformers, which gets its mean pooling."""

    def __init__(self, name: str, folder: Path, asked: Asked):
        import sentence_transformers

        self.device = device_of(asked)
        self.model: Any = sentence_transformers.SentenceTransformer(str(folder), device=self.device)
        if asked.max_length:
            self.model.max_seq_length = asked.max_length
        self.name, self.fingerprint = name, fingerprint_of(folder)
        self.sees = bool(self.model.supports("image"))
        self._prompt = asked.query_task if asked.query_task in (self.model.prompts or {}) else None
        self._max_pixels = asked.max_pixels or MAX_PIXELS
        self.dims = (self._texts(["width"], False).shape[1],)
        pooled = {} if (folder / "modules.json").is_file() else {"pooling": "mean, for want of a modules.json"}
        self.settings = {
            "max_length": f"{self.model.max_seq_length}{'' if asked.max_length else ' (its own)'}",
            "instruction of queries": instruction(asked, self.model.prompts[self._prompt] if self._prompt else None),
            "library": f"sentence-transformers {sentence_transformers.__version__}",
            "computes in": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            **pooled,
        }

    def _texts(self, texts: Sequence[str], query: bool) -> np.ndarray:
        more = {"prompt_name": self._prompt} if query and self._prompt else {"prompt": ""}
        found: np.ndarray = self.model.encode(list(texts), batch_size=BATCH, show_progress_bar=False, **more)
        return found

    def _images(self, images: Sequence[bytes]) -> np.ndarray:
        rows = [
            self.model.encode([_picture(i, self._max_pixels) for i in part], show_progress_bar=False)
            for part in _batches(images)
        ]
        return np.concatenate(rows)


class Transformers(Embedder):
    """A model of transformers with `get_text_features` and `get_image_features`: CLIP, SigLIP, …"""

    def __init__(self, name: str, folder: Path, asked: Asked):
        import transformers

        self.device = device_of(asked)
        self.model: Any = transformers.AutoModel.from_pretrained(folder).eval().to(self.device)
        loader: Any = transformers.AutoProcessor
        self.processor = loader.from_pretrained(folder)
        self.name, self.fingerprint, self.sees = name, fingerprint_of(folder), True
        text = self.model.config.get_text_config()
        self._length = min(asked.max_length or text.max_position_embeddings, text.max_position_embeddings)
        self._padding = "max_length" if "siglip" in self.model.config.model_type else True  # as SigLIP was trained
        self._max_pixels = asked.max_pixels or MAX_PIXELS
        self.dims = (self._texts(["width"], False).shape[1],)
        self.settings = {
            "max_length": f"{self._length}{'' if asked.max_length else ' (its own)'}",
            "instruction of queries": instruction(asked, None),
            "library": f"transformers {transformers.__version__}",
            "computes in": "bfloat16" if self.device == "cuda" else str(self.model.dtype).removeprefix("torch."),
        }

    def _texts(self, texts: Sequence[str], query: bool) -> np.ndarray:
        def embed(part: Sequence[str]) -> Any:
            inputs = self.processor(
                text=list(part), return_tensors="pt", padding=self._padding, truncation=True, max_length=self._length
            ).to(self.device)
            return _features(self.model.get_text_features(**inputs))

        return _in_batches(texts, embed, self.device)

    def _images(self, images: Sequence[bytes]) -> np.ndarray:
        def embed(part: Sequence[bytes]) -> Any:
            pictures = [_picture(image, self._max_pixels) for image in part]
            inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
            return _features(self.model.get_image_features(**inputs))

        return _in_batches(images, embed, self.device)


def _features(found: Any) -> Any:
    """Before transformers 5 a tensor, since then an output whose `pooler_output` it is."""
    return getattr(found, "pooler_output", found)


def _pairs(folder: Path) -> bool:
    """Whether transformers' model of a folder embeds texts and images into one space."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    classes = transformers.MODEL_MAPPING
    return type(config) in classes and hasattr(classes[type(config)], "get_image_features")


def _in_batches(items: Sequence[Any], embed: Any, device: str) -> np.ndarray:
    """float32 rows of items; on a GPU under autocast to bfloat16."""
    import torch

    rows = []
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        rows += [embed(part).float().cpu().numpy() for part in _batches(items)]
    return np.concatenate(rows)


def _batches(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[first : first + BATCH] for first in range(0, len(items), BATCH)]


def _picture(image: bytes, max_pixels: int) -> Any:
    from vision_tower import load_image

    return load_image(image, max_pixels=max_pixels)


def _of_tensors(tensors: dict[str, Any]) -> str:
    """sha256 of a model's tensors, by name: of one that came from a library's list, not from a folder."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0{tensors[name].dtype}\0{tuple(tensors[name].shape)}\0".encode())
        digest.update(np.ascontiguousarray(tensors[name].detach().cpu().float().numpy()).tobytes())
    return digest.hexdigest()
