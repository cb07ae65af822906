"""Any model that can be measured, as an object for `mteb.evaluate`.

mteb looks at no weights. Its results are kept by name, revision and `experiment_kwargs`, its embeddings by the last
alone, and its tables join the revisions of a name. So the hash of the weights is in all three; what else the figures
depend on (length, instruction, precision) is in `experiment_kwargs`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from stage_trainer import hub
from stage_trainer.errors import UserError
from stage_trainer.evaluation.foreign_models import OPEN_CLIP
from stage_trainer.evaluation.models import BATCH, Embedder
from stage_trainer.metrics.retrieval import unit
from stage_trainer.recipe.limits import MAX_PIXELS

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

INSTRUCTED = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking", "DocumentUnderstanding")
"""mteb's types of tasks whose queries get the instruction, if one was asked for: those of texts and of pages. Captions
that look for photos are no queries in this sense, as in `evaluate --suite`."""


class MtebModel(AbsEncoder):
    """What mteb calls. Rows have length one after they are cut; of a text with an image they are summed.

    Args:
        embedder: the model.
        dim: one of its Matryoshka dims; None for the whole width.
        max_pixels: larger images are refused.

    Attributes:
        mteb_model_meta: set by mteb, in `ModelMeta.load_model`.
    """

    mteb_model_meta: ModelMeta

    def __init__(self, embedder: Embedder, dim: int | None = None, max_pixels: int | None = None):
        self.embedder, self.dim = embedder, embedder.dims[0] if dim is None else dim
        self.max_pixels = max_pixels or MAX_PIXELS

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """float32 `[N, dim]`, in the order of the inputs. Of texts with images a model without an image tower takes the
        texts. `batch_size` is how many images mteb decodes at a time; what is computed at a time is our own.

        Args:
            inputs: batches with the columns `text`, `image` (PIL, of any mode) or both.

        Raises:
            UserError: the embeddings cannot be ranked by; neither texts nor images that the model can embed; a
                `precision` is asked for.
        """
        if kwargs.get("precision") not in (None, "float32"):
            raise UserError(f"precision={kwargs['precision']!r}: embeddings are float32 here; leave it out")
        query = prompt_type == PromptType.query and task_metadata.type in INSTRUCTED
        texts: list[str] = []
        images = self.embedder.embed_image_batches(self._images(inputs, texts))
        parts = [images] if len(images) else []
        if texts:
            parts.append(self.embedder.embed_texts(texts, query=query))
        if not parts or {len(part) for part in parts} != {len(parts[0])}:
            counts = f"{len(texts):,} texts and {len(images):,} images"
            raise UserError(
                f"{task_metadata.name} ({hf_split}, {hf_subset}) has {counts}; expected either, or equally many of both"
            )
        units = [unit(part[:, : self.dim]) for part in parts]
        return np.asarray(units[0] if len(units) == 1 else units[0] + units[1], dtype=np.float32)

    def _images(self, inputs: Any, texts: list[str]) -> Iterator[list[bytes]]:
        """The encoded images, a part at a time; the texts beside them are appended to `texts`."""
        waiting: list[bytes] = []
        for batch in inputs:
            texts += batch.get("text", [])
            pictures = [image for image in batch.get("image", []) if image is not None]
            if not self.embedder.sees and "text" in batch:
                continue
            for picture in pictures:
                waiting.append(_encoded(picture, self.max_pixels))
                if len(waiting) == BATCH:
                    yield waiting
                    waiting = []
        if waiting:
            yield waiting


def meta_of(embedder: Embedder, max_pixels: int | None = None) -> ModelMeta:
    """The model's card for mteb. `mteb.evaluate` takes it as it is, or what its `load_model(embed_dim=…)` returns."""
    settings = _settings(embedder)

    def load(name: str, revision: str | None = None, *, embed_dim: int | None = None, **asked: Any) -> MtebModel:
        if asked != settings:
            other = ", ".join(sorted({key for key in asked.keys() | settings if asked.get(key) != settings.get(key)}))
            raise UserError(f"{name} was opened with other settings ({other}); give them to `mteb_model` instead")
        return MtebModel(embedder, embed_dim, max_pixels)

    return ModelMeta(
        loader=load,
        name=_name(embedder),
        revision=embedder.fingerprint,
        experiment_kwargs=settings,
        modalities=["text", "image"] if embedder.sees else ["text"],
        embed_dim=list(embedder.dims),
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=embedder.settings.get("instruction of queries", "none") != "none",
        framework=["PyTorch"],
        training_datasets=None,  # unknown; an empty set would say that it was trained on none of mteb's
        release_date=None,
        languages=None,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=None,
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
    )


def load(embedder: Embedder, dim: int | None = None, max_pixels: int | None = None) -> MtebModel:
    """The model at one of its dims, with its `mteb_model_meta`.

    Raises:
        UserError: it has no such dim.
    """
    if dim is not None and dim not in embedder.dims:
        raise UserError(f"{embedder.name} has no dim {dim}; it has {', '.join(map(str, embedder.dims))}")
    cut = None if dim == embedder.dims[0] else dim  # mteb would keep figures of the whole width twice
    model = meta_of(embedder, max_pixels).load_model(embed_dim=cut)
    assert isinstance(model, MtebModel)
    return model


def _name(embedder: Embedder) -> str:
    """OWNER/MODEL-HASH, as mteb wants names."""
    owner, model = "local", embedder.name
    if hub.is_name(model):
        owner, model = model.split("/")
    elif model.startswith(OPEN_CLIP):
        owner, model = "open_clip", model.removeprefix(OPEN_CLIP)
    else:
        model = model.rstrip("/").rpartition("/")[2]
    return f"{owner}/{re.sub(r'[^A-Za-z0-9._-]+', '-', model)}-{embedder.fingerprint[:12]}"


def _settings(embedder: Embedder) -> dict[str, str]:
    """What figures depend on, short enough for the name of a folder, and a hash of all of it with the weights."""
    every = json.dumps([embedder.fingerprint, embedder.settings], sort_keys=True)
    shown = {
        key.replace(" ", "_"): value.replace("×", "x").encode("ascii", "backslashreplace").decode()
        for key, value in embedder.settings.items()
    }
    return {**shown, "weights_and_settings": hashlib.sha256(every.encode()).hexdigest()[:16]}


def _encoded(picture: Any, max_pixels: int) -> bytes:
    """mteb hands over palettes, transparency and CMYK as they are: upright RGB by our own rules, not compressed."""
    from vision_tower import load_image

    buffer = io.BytesIO()
    load_image(picture, max_pixels=max_pixels).save(buffer, "ppm")
    return buffer.getvalue()
