"""Captioned images with what a teacher says of the images, or of the captions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from data_prep.shards import Dataset, Unusable
from vision_tower import load_pixels

from stage_trainer.data.samples import image_of, texts_of
from stage_trainer.data.taught import Said, first_in


class TaughtImages(Said):
    """Captioned images; a sample has the teacher's embedding of its image, as the teacher shows it to itself."""

    of: ClassVar[str] = "images"

    def questions(self, data: Dataset, index: int) -> list[Any]:
        """The encoded image, of which is known that it can be decoded. Errors as `Said.questions`."""
        members = data.read(index)
        texts_of(data, index, members)  # a sample without captions is replaced anyway
        image = image_of(members)
        assert image is not None  # content_of guarantees it
        load_pixels(image, name=f"{data.directory}, sample {data.row(index).key}", max_pixels=self.cache.max_pixels)
        return [image]

    def maker(self, weights: str, max_tokens: int) -> dict[str, object]:
        """The weights, and which images are too large."""
        return {"weights": weights, "max_pixels": self.cache.max_pixels}

    def _origin(self) -> dict[str, object]:
        return {"teacher": self.teacher.model, "of": self.of}


class TaughtCaptions(Said):
    """Captioned images; each caption has the teacher's embedding of itself or, if the teacher has a language, of the
    sample's first caption in it."""

    of: ClassVar[str] = "captions"

    def questions(self, data: Dataset, index: int) -> list[Any]:
        """All captions, or the one in the teacher's language. Errors as `Said.questions`."""
        captions, language = texts_of(data, index, data.read(index))["captions"], self.teacher.language
        if language is None:
            return [caption["text"] for caption in captions]
        if (found := first_in(language, captions)) is None:
            raise Unusable(f"no caption in {language!r}, which the teacher reads")
        return [found]

    def _with(self, content: dict[str, Any], vectors: torch.Tensor) -> dict[str, Any]:
        captions = content["captions"]
        rows = [0] * len(captions) if self.teacher.language else range(len(captions))
        taught = [{**one, "teacher": {self.of: vectors[row]}} for one, row in zip(captions, rows, strict=True)]
        return {**content, "captions": taught}

    def _origin(self) -> dict[str, object]:
        return {**super()._origin(), "of": self.of}
