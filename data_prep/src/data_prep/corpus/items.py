"""What every source turns its material into: texts with their origin, and items that are split as one."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from data_prep.errors import UserError
from data_prep.samples import Text

_ARTICLES = re.compile(r"^(a|an|the|some)\s+")
_NOT_WORDS = re.compile(r"[\W_]+")


class CorpusError(UserError):
    """Something that the user can mend: a missing package, a folder in the way, an option out of range."""


@dataclass(frozen=True, slots=True)
class ImageItem:
    """A picture with its names.

    name: identity, e.g. "emoji-1f600"; the key of its samples.
    source: "emoji", "stamps" or "drawn"; long_source: the source under which its long captions are filed.
    group: from coarse to fine ("Food & Drink", "food-fruit"); order: place among its source; hard negatives come from
        neighbours in both.
    labels: items that share a label are one family and stay in one split.
    names, keywords, long: texts by role, each in many languages; long may be empty.
    png: the picture as it is stored, RGB.
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
    """What two captions have in common that say the same: no case, no punctuation, no English article in front.

    Two texts of signs alone ("⁇") stay as they are.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = " ".join(_NOT_WORDS.sub(" ", folded).split())
    return _ARTICLES.sub("", words) or folded
