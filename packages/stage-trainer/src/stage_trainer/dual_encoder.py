"""The model that training produces: two towers, one space, a temperature for each task."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stage_trainer import hub
from stage_trainer.encoding.encode import Encoded, Rows, encode, similarity
from stage_trainer.encoding.options import EncodeOptions
from stage_trainer.encoding.precision import AUTO, computing_in, dtype_of
from stage_trainer.errors import UserError
from stage_trainer.files import whole_directory
from stage_trainer.formats import jina_clip_read, open_clip_read
from stage_trainer.formats.parts import BIASES, Parts

if TYPE_CHECKING:
    from text_tower import TextTower
    from vision_tower import VisionTower

FORMAT = "trilith-dual-encoder/1"
TEXT, VISION = "text", "vision"  # the towers' folders


class DualEncoder(nn.Module):
    """A text tower and a vision tower whose embeddings have the same width.

    Args:
        text: encodes text, `[N, D]`.
        vision: encodes images, `[N, D]`.
        temperature: the initial value of both temperatures (paper: learnable, one for each task).
        matryoshka_dims: the prefixes that were trained to be used alone; None if none were.

    Attributes:
        logit_scale: ln(1 / temperature) of the image-text task, shape [1], float32; the published `logit_scale`.
        text_logit_scale: the same of the text task.
        logit_bias, text_logit_bias: what a sigmoid loss learns beside them, shape [1], float32; None without one.
    """

    logit_bias: nn.Parameter | None
    text_logit_bias: nn.Parameter | None

    def __init__(
        self,
        text: TextTower,
        vision: VisionTower,
        *,
        temperature: float = 0.07,
        matryoshka_dims: Sequence[int] | None = None,
    ):
        super().__init__()
        if text.config.output_width != vision.config.output_width:
            raise UserError(
                f"embeddings of the text tower have {text.config.output_width} numbers and those of the vision tower "
                f"{vision.config.output_width}; they share one space: give one of the towers a projector to the "
                "other's width"
            )
        self.text, self.vision = text, vision
        self.matryoshka_dims = tuple(matryoshka_dims) if matryoshka_dims else None
        self.logit_scale = nn.Parameter(torch.full((1,), -math.log(temperature)))
        self.text_logit_scale = nn.Parameter(torch.full((1,), -math.log(temperature)))
        self.set_biases(None)

    def set_biases(self, values: tuple[float, float] | None) -> None:
        """Makes `logit_bias` and `text_logit_bias` with these values, or removes them."""
        for name, value in zip(BIASES, values or (None, None), strict=True):
            parameter = None if value is None else nn.Parameter(torch.full_like(self.logit_scale.detach(), value))
            self.register_parameter(name, parameter)

    def encode(self, inputs: Any, **options: Any) -> Rows | Encoded:
        """Embeds a list of texts and images: `[N, D]`, or `[D]` of one that is not in a list; float32 unless
        `precision` says otherwise.

        A string is a text, unless it is the URL of an image (one word that begins with http:// or https://), a
        `data:image/…` URI, or the path of an image (it ends in .jpg, .png, … and has no spaces, or is a file). `Path`s,
        bytes, PIL images, arrays and tensors are images. `{"text": …}` and `{"image": …}` say it explicitly: write the
        first for strings of others, which could otherwise make this machine read a file or fetch a URL.

        Args:
            inputs: one of these, or a list of them, mixed freely.
            options: see `EncodeOptions`; sentence-transformers' names are known too.

        Returns:
            An array, a tensor or a list of tensors, as the options say; with `errors="skip"` that and what was left
            out, as `Encoded`.

        Raises:
            UserError: an unknown option, or an entry that is neither text nor image.
            ImageError: an image that cannot be used; the message has its place in the list and its name.
        """
        asked = EncodeOptions.of(options)
        if asked.device is not None:
            self.to(asked.device)
        return encode(self.text, self.vision, inputs, asked)

    def similarity(self, first: Any, second: Any) -> Tensor:
        """Cosine similarities `[N, M]` of embeddings `[N, D]` and `[M, D]`, or of single ones."""
        return similarity(first, second)

    def encode_text(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """Embeds texts: `[N, D]` float32. Options are those of `TextTower.encode` (`task`, `truncate_dim`, …), and
        `dtype` as in `encode`."""
        with self._computing(options):
            return self.text.encode(texts, **options)

    def encode_image(self, images: Sequence[Any], **options: Any) -> np.ndarray:
        """Embeds images (paths, PIL images, arrays): `[N, D]` float32. Options are those of `VisionTower.encode`, and
        `dtype` as in `encode`."""
        with self._computing(options):
            return self.vision.encode(images, **options)

    def _computing(self, options: dict[str, Any]) -> torch.autocast:
        """The context for `dtype`, which is taken out of the options."""
        device = self.logit_scale.device
        return computing_in(dtype_of(options.pop("dtype", AUTO), device), device)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes `config.json`, `text/` and `vision/`, each tower in its own loadable form; completely or not at all.

        Raises:
            UserError: `path` exists, or the disk is full.
        """
        with whole_directory(path) as directory:
            self.write_into(directory)

    def write_into(self, directory: Path, layout: str = "transformers", *, apart: bool = False) -> None:
        """What `save_pretrained` writes, into a directory that exists; `layout` is `TextTower.save_pretrained`'s, and
        `apart` `VisionTower.save_pretrained`'s."""
        config = {
            "format": FORMAT,
            "logit_scale": float(self.logit_scale.detach()),
            "text_logit_scale": float(self.text_logit_scale.detach()),
            "matryoshka_dimensions": self.matryoshka_dims,
        }
        config |= {name: float(bias.detach()) for name in BIASES if (bias := getattr(self, name)) is not None}
        self.text.save_pretrained(directory / TEXT, layout=layout)
        self.vision.save_pretrained(directory / VISION, apart=apart)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
    ) -> DualEncoder:
        """Reads what `save_pretrained` wrote, a directory in jina-clip-v2's layout, or open_clip's of such towers.

        Args:
            path: the directory; or, if there is none, the name of a repository of the Hugging Face hub that is one,
                "jinaai/jina-clip-v2", which is downloaded once.
            text, vision: options of `TextTower.from_pretrained` and `VisionTower.from_pretrained`.

        Raises:
            UserError: no such directory, not one of these formats, or one that is damaged.
        """
        from text_tower import TextTower
        from vision_tower import VisionTower

        path = hub.local(path) if hub.is_name(path) else Path(path)
        if jina_clip_read.is_one(path):
            return cls._of(jina_clip_read.read(path, text or {}, vision or {}))
        if open_clip_read.is_one(path):
            return cls._of(open_clip_read.read(path, text or {}, vision or {}))
        config = read_config(path)
        try:
            towers = (
                TextTower.from_pretrained(path / TEXT, **(text or {})),
                VisionTower.from_pretrained(path / VISION, **(vision or {})),
            )
        except (ValueError, OSError) as error:  # the towers say what is missing or damaged
            raise UserError(f"cannot load {path}: {error}") from error
        return cls._of(Parts(*towers, config.logit_scale, config.text_logit_scale, config.dims, config.biases))

    @classmethod
    def _of(cls, parts: Parts) -> DualEncoder:
        model = cls(parts.text, parts.vision, matryoshka_dims=parts.dims)
        with torch.no_grad():
            model.logit_scale.fill_(parts.logit_scale)
            model.text_logit_scale.fill_(parts.text_logit_scale)
        model.set_biases(parts.biases)
        return model


class StoredConfig(NamedTuple):
    """What config.json of a model of two towers says."""

    logit_scale: float
    text_logit_scale: float
    dims: tuple[int, ...] | None
    biases: tuple[float, float] | None


def read_config(path: Path) -> StoredConfig:
    """The config.json that `DualEncoder.save_pretrained` wrote.

    Raises:
        UserError: there is none, it is of another format, or damaged.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes().decode())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path} holds no model: there is no config.json; expected a directory written by "
            "`stage-trainer export` or the model/ folder of a checkpoint"
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); export the model again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise UserError(
            f"{file} has format {repr(found)[:200]}; expected {FORMAT!r}, a model of two towers, "
            "jina-clip-v2's layout, or open_clip's. A tower alone is started from: name it as model.text_weights or "
            "model.vision_weights of a recipe"
        )
    scales = [
        _number(config.get(key), 20, f"{file}: {key}", "ln(1 / temperature)")
        for key in ("logit_scale", "text_logit_scale")
    ]
    if "matryoshka_dimensions" not in config:
        raise UserError(f"{file} lacks matryoshka_dimensions; expected a list of dims, or null. Export the model again")
    dims = config["matryoshka_dimensions"]
    if dims is not None and not (isinstance(dims, list) and all(type(n) is int and 0 < n < 2**31 for n in dims)):
        raise UserError(f"{file}: matryoshka_dimensions is {str(dims)[:200]}; expected a list of dims, or null")
    biases = None
    if any(key in config for key in BIASES):
        image_text, text = (_number(config.get(key), 1000, f"{file}: {key}", "a sigmoid loss's bias") for key in BIASES)
        biases = image_text, text
    return StoredConfig(scales[0], scales[1], tuple(dims) if dims else None, biases)


def _number(value: Any, limit: int, where: str, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= limit:
        raise UserError(f"{where} is {str(value)[:200]!r}; expected {what}, a number from -{limit} to {limit}")
    return float(value)
