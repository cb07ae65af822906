"""Any model that can be measured, behind one interface: ours here, those of other libraries in `foreign_models`."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stage_trainer.errors import UserError
from stage_trainer.files import fingerprint_of

if TYPE_CHECKING:
    from stage_trainer.dual_encoder import DualEncoder

BATCH = 64
_SAME = 1e-6  # rows of length one that differ by less are one direction, in float32


@dataclass(frozen=True)
class Asked:
    """What the user leaves to a measurement and published figures do not say.

    Attributes:
        max_length: tokens kept of a text; None for 512, the published jina-clip-v2's, or what another model states.
        query_task: the task whose instruction (and adapter) queries of text and document retrieval get; None for none.
        device: where it computes; None for a GPU if there is one.
        max_pixels: larger images are refused.
    """

    max_length: int | None = None
    query_task: str | None = None
    device: str | None = None
    max_pixels: int | None = None


class Embedder(ABC):
    """A model that embeds texts, and images if it has a tower for them.

    Attributes:
        name: what its column is called.
        fingerprint: sha256 of its weights and configuration, by content.
        dims: at which it is measured: the whole width first, then its Matryoshka dims, falling.
        settings: what its figures depend on besides, to be printed with them.
        sees: whether it embeds images.
    """

    name: str
    fingerprint: str
    dims: tuple[int, ...]
    settings: dict[str, str]
    sees: bool

    @abstractmethod
    def _texts(self, texts: Sequence[str], query: bool) -> np.ndarray: ...

    @abstractmethod
    def _images(self, images: Sequence[bytes]) -> np.ndarray: ...

    def embed_texts(self, texts: Sequence[str], *, query: bool = False) -> np.ndarray:
        """float32 `[N, D]`, not normalised. `query`: they are queries of text or document retrieval, which have an
        instruction if one was asked for.

        Raises:
            UserError: they cannot be ranked by: not finite, zero, or all the same.
        """
        return self._checked(self._texts(texts, query), texts, "texts")

    def embed_images(self, images: Sequence[bytes]) -> np.ndarray:
        """float32 `[N, D]`, not normalised, of encoded images.

        Raises:
            UserError: the model has no image tower, or as `embed_texts`.
        """
        return self.embed_image_batches([images])

    def embed_image_batches(self, batches: Iterable[Sequence[bytes]]) -> np.ndarray:
        """`embed_images` of images that come in parts and are not kept. Whether all embeddings are the same is asked of
        all of them together: the few images of a last part may well look alike, as blank pages do.
        """
        rows: list[np.ndarray] = []
        different: set[bytes] = set()
        for images in batches:
            if not self.sees:
                raise UserError(f"{self.name} has no image tower; measure it with --suite text")
            rows.append(self._images(images))
            different.update(hashlib.sha256(image).digest() for image in images)
        if not rows:
            return np.empty((0, self.dims[0]), np.float32)
        return self._checked(np.concatenate(rows), list(different), "images")

    def _checked(self, rows: np.ndarray, items: Sequence[object], what: str) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.float32)
        lengths = np.linalg.norm(rows, axis=1)
        broken = "not finite" if not np.isfinite(rows).all() else "zero" if not lengths.all() else ""
        if not broken and len(set(items)) > 1:
            units = rows / lengths[:, None]
            broken = "all the same" if np.abs(units - units[0]).max() < _SAME else ""
        if broken:
            rule = "all the same, though what they are of differs" if broken == "all the same" else broken
            raise UserError(
                f"{self.name}: its embeddings of {len(rows):,} {what} are {rule}, so a ranking by them would say "
                "nothing; was its training healthy, and does it compute in a precision that its weights bear?"
            )
        return rows


class Ours(Embedder):
    """A `DualEncoder`: an export, a checkpoint's model, the published jina-clip directories."""

    def __init__(self, folder: Path, name: str, asked: Asked):
        from stage_trainer.dual_encoder import DualEncoder
        from stage_trainer.encoding.precision import AUTO, dtype_of
        from stage_trainer.recipe.limits import MAX_PIXELS

        self.model: DualEncoder = DualEncoder.from_pretrained(folder).eval()
        device = device_of(asked)
        self.model.to(device)
        config = self.model.text.config
        self.name, self.fingerprint, self.sees = name, fingerprint_of(folder), True
        self.dims = tuple(sorted({*(self.model.matryoshka_dims or ()), config.output_width}, reverse=True))
        self._max_pixels = asked.max_pixels or MAX_PIXELS
        self._length = min(asked.max_length or 512, config.max_length)
        self._task = asked.query_task if asked.query_task in config.tasks else None
        if asked.query_task and config.tasks and not self._task:
            raise UserError(f"{name} knows no task {asked.query_task!r}; it knows {', '.join(config.tasks)}")
        self.settings = {
            "max_length": str(self._length),
            "instruction of queries": instruction(
                asked, config.instructions.get(self._task, "") if self._task else None
            ),
            "resolution": "×".join(map(str, np.broadcast_to(self.model.vision.config.resolution, 2))),
            "computes in": str(dtype_of(AUTO, self.model.logit_scale.device)).removeprefix("torch."),
        }

    def _texts(self, texts: Sequence[str], query: bool) -> np.ndarray:
        task = self._task if query else None
        return self.model.encode_text(texts, task=task, max_length=self._length, normalize=False)

    def _images(self, images: Sequence[bytes]) -> np.ndarray:
        return self.model.encode_image(images, normalize=False, max_pixels=self._max_pixels, batch_size=BATCH)


def instruction(asked: Asked, found: str | None) -> str:
    """How settings tell the instruction of queries: also that a model has none for what was asked."""
    return repr(found) if found is not None else f"none, not knowing {asked.query_task}" if asked.query_task else "none"


def device_of(asked: Asked) -> str:
    import torch

    return asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
