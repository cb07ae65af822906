"""Which entries of a list are texts and which are images, and opening the images one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from os import PathLike
from os.path import isfile
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from torch import Tensor

from stage_trainer.encoding import IMAGE_SUFFIXES
from stage_trainer.encoding.fetch import UrlLimits, bytes_of_data_uri, bytes_of_url
from stage_trainer.errors import UserError
from stage_trainer.recipe.address import without_credentials

if TYPE_CHECKING:
    from PIL import Image


_NO_FILE = "there is no such file"


class Picture(NamedTuple):
    """An image of the list.

    Attributes:
        place: its number there.
        source: a URL, a data URI, or anything that `vision_tower.load_image` takes.
    """

    place: int
    source: Any

    @property
    def name(self) -> str:
        if isinstance(self.source, str) and self.source[:5].lower() == "data:":
            return f"a data URI of {len(self.source):,} characters"
        if isinstance(self.source, str | PathLike):
            return without_credentials(str(self.source))
        given = getattr(self.source, "filename", "")
        return str(given) if given else f"an image given as {type(self.source).__name__}"


class Skipped(NamedTuple):
    """An image that could not be used: its place in the list (a number), its name, and why."""

    place: int
    name: str
    reason: str


def is_single(inputs: Any) -> bool:
    """Whether this is one text or image rather than a list of them."""
    if isinstance(inputs, Tensor | np.ndarray):
        return inputs.ndim in (2, 3)
    return isinstance(inputs, str | bytes | bytearray | memoryview | PathLike | Mapping) or (
        not isinstance(inputs, Iterable)
    )


def told_apart(inputs: Iterable[Any]) -> tuple[dict[int, str], list[Picture]]:
    """({place: text}, images) of a list; a bare string's kind is as `DualEncoder.encode` says.

    Raises:
        UserError: a set or a table, or an entry that is neither; the message says its place.
    """
    if isinstance(inputs, Set) or hasattr(inputs, "columns") or hasattr(inputs, "column_names"):
        raise UserError(
            f"encode takes a list of texts and images and got a {type(inputs).__name__}, whose parts are names or in "
            "no order; write encode(list(values)), or encode(table['caption'])"
        )
    texts: dict[int, str] = {}
    pictures: list[Picture] = []
    for index, entry in enumerate(inputs):
        if isinstance(entry, Mapping):
            kind, value = _stated(entry, index)
        else:
            kind, value = ("text" if isinstance(entry, str) and not _names_an_image(entry) else "image"), entry
        if kind == "text":
            texts[index] = str(value)
        elif value is None or isinstance(value, bool | int | float):
            raise UserError(f"inputs[{index}] is {value!r}, a {type(value).__name__}; expected a text or an image")
        else:
            pictures.append(Picture(index, value))
    return texts, pictures


def _stated(entry: Mapping[Any, Any], index: int) -> tuple[str, Any]:
    """Of {"text": …} or {"image": …}."""
    if len(entry) == 1 and (kind := next(iter(entry))) in ("text", "image"):
        value = entry[kind]
        if kind == "image" or isinstance(value, str):
            return kind, value
    raise UserError(
        f"inputs[{index}] is a {type(entry).__name__} with {', '.join(map(repr, entry)) or 'nothing'}; expected "
        "{'text': a string} or {'image': …}, one of them"
    )


def _names_an_image(text: str) -> bool:
    start = text[:11].lower()
    if start.startswith("data:image/"):
        return True
    one_word = not any(character.isspace() for character in text)
    if start.startswith(("http://", "https://")):
        return one_word
    return text.lower().endswith(IMAGE_SUFFIXES) and (one_word or isfile(text))


def load(
    picture: Picture, limits: UrlLimits, max_pixels: int | None, prepare: Callable[[Image.Image], Tensor]
) -> Tensor | Skipped:
    """What `prepare` makes of an image, which it gets as RGB; or, of one that cannot be used, why."""
    from vision_tower import ImageError, load_image

    most = {} if max_pixels is None else {"max_pixels": max_pixels}
    try:
        return prepare(load_image(_content(picture.source, limits), name=picture.name, **most))
    except FileNotFoundError:
        return Skipped(picture.place, picture.name, _NO_FILE)
    except (ImageError, UserError) as error:
        return Skipped(picture.place, picture.name, str(error))


def refuse(skipped: Skipped) -> NoReturn:
    """Raises ImageError for an image that cannot be used; the message has its place and name."""
    from vision_tower import ImageError

    named = skipped.reason if skipped.reason.startswith(skipped.name) else f"{skipped.name}: {skipped.reason}"
    hint = "; if it is a text, write {'text': …}" if skipped.reason == _NO_FILE else ""
    raise ImageError(f"inputs[{skipped.place}]: {named}{hint}")


def _content(source: Any, limits: UrlLimits) -> Any:
    if isinstance(source, str):
        start = source[:8].lower()
        if start.startswith("data:"):
            return bytes_of_data_uri(source)
        if start.startswith(("http://", "https://")):
            return bytes_of_url(source, limits)
    return source
