"""The settings of a corpus, and the items that its sources produce; an item is in one split as a whole."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from data_prep.errors import UserError
from data_prep.samples import Text

_ARTICLES = re.compile(r"^(a|an|the|some)\s+")
_NOT_WORDS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Settings:
    """The settings of a corpus; equal settings and packages give equal bytes.

    drawn: number of procedurally drawn pictures, or None for the real corpus from Debian packages.
    seed: of the split and of every choice; image_size: side of the stored pictures in pixels.
    vocab_size: pieces of the tokenizer, None for 16384 (384 if drawn); max_packages: package descriptions at most.
    without: sources left out, of "stamps", "flags", "packages", "help".
    """

    drawn: int | None = None
    seed: int = 0
    image_size: int = 80
    vocab_size: int | None = None
    max_packages: int = 25_000
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, most in (
            ("image_size", self.image_size, 4096),
            ("vocab_size", self.vocab_size, 1_000_000),
            ("max_packages", self.max_packages, 2**53),
        ):
            if value is not None and not 1 <= value <= most:
                raise UserError(f"{name} {value}: expected 1 to {most}")


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image with its texts.

    name: identity, e.g. "emoji-1f600"; the key of its samples.
    source: "emoji", "stamps" or "drawn"; long_source: the data set of its long captions.
    group: from coarse to fine ("Food & Drink", "food-fruit"); order: place in its source; hard negatives are its
        neighbours in both.
    labels: items that share a label are one family, which is in one split.
    names, keywords, long: texts by role, each in many languages; long may be empty.
    png: the stored image, RGB.
    """

    name: str
    source: str
    long_source: str
    group: tuple[str, ...]
    order: int
    labels: tuple[str, ...]
    names: tuple[Text, ...]
    keywords: tuple[Text, ...]
    long: tuple[Text, ...]
    png: bytes

    @property
    def english(self) -> str:
        """Its English name; "" if it has none."""
        return next((text.text for text in self.names if text.language == "en"), "")


@dataclass(frozen=True, slots=True)
class TextItem:
    """A text pair: alternatives of the query and of the target; split like the images, by `labels`."""

    name: str
    source: str
    labels: tuple[str, ...]
    query: tuple[Text, ...]
    target: tuple[Text, ...]


def normalized(text: str) -> str:
    """A caption without case, punctuation and a leading English article, to find equal ones.

    Texts of signs alone ("⁇") are kept.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = " ".join(_NOT_WORDS.sub(" ", folded).split())
    return _ARTICLES.sub("", words) or folded
