"""What the columns of a data set are: image, captions, language, names of labels."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.errors import UserError
from data_prep.languages import house_language, is_code
from data_prep.samples import Text
from data_prep.shards.format import JsonObject

_CAPTIONS = ("caption", "captions", "text", "txt", "sentence", "sentences", "title", "alt_text", "prompt")
_LONG = ("long_caption", "long", "description", "detailed_caption")
_LANGUAGE = ("language", "lang", "locale")
_NO_CAPTIONS = (
    "id",
    "key",
    "url",
    "uri",
    "path",
    "file",
    "name",
    "split",
    "license",
    "source",
    "md5",
    "sha256",
    "hash",
)
_NEGATIVE = re.compile(
    r"(hard_)?neg(ative)?s?(_(image|img|picture|photo|page|passage)s?)?(_(file|filename|file_name|path)s?)?(_?\d+)?"
)
NEGATIVE_COLUMNS = "columns of hard-negative images, with commas (default: negative, neg_image, negative_1, …)"
_TEXT = ("text", "caption", "raw", "sentence", "value")


@dataclass(frozen=True)
class Kinds:
    """What the columns hold.

    columns: in their order, each with "image", "text" (texts in lists and structs, too), "bytes" (which may be texts)
        or "". labels: of a column of
        class numbers the names of the classes.
    """

    columns: dict[str, str]
    labels: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Columns:
    """Names of columns, "" for none; `a.b` is the field b of a column a.

    needed: those to read; of rows of texts none is named here, and each file's own columns say what they are.
    labels: of a column of class numbers the names of the classes. negatives: columns of hard-negative images.
    """

    image: str = ""
    captions: Sequence[str] = ()
    long: str = ""
    language: str = ""
    needed: Sequence[str] = ()
    labels: dict[str, list[str]] = field(default_factory=dict)
    negatives: Sequence[str] = ()

    def plain(self) -> JsonObject:
        """Plain values, from which `Columns(**values)` is the same."""
        return asdict(self)

    def named_labels(self, row: JsonObject) -> JsonObject:
        """The row with the names of its classes in place of their numbers."""
        named = {
            column: names[row[column]]
            for column, names in self.labels.items()
            if isinstance(row.get(column), int) and 0 <= row[column] < len(names)
        }
        return {**row, **named}


def find_columns(data: str, kinds: Kinds | None, named: dict[str, str]) -> Columns:
    """The columns that the user `named` (image, captions, long, language, negatives), else those of the usual types and
    names.

    Args:
        kinds: None for JSON lines, which hold texts.

    Raises:
        UserError: a named column is not there, or several columns may be the image or the caption.
    """
    if kinds is None:
        if named["image"] or named["captions"]:
            raise UserError(
                f"{data}: JSON lines hold no images; `data-prep import images --table` reads names of files"
            )
        return Columns(language=named["language"])
    names, features = list(kinds.columns), kinds.columns
    several = (*named["captions"].split(","), *named["negatives"].split(","))
    for given in (*several, named["image"], named["long"], named["language"]):
        if given and given not in features and given.partition(".")[0] not in features:
            raise UserError(f"{data}: has no column {given!r}; it has {', '.join(names)}")
    images = [name for name in names if features[name] == "image"]
    negatives = named["negatives"].split(",") if named["negatives"] else usual_negatives(images)
    if texts := [name for name in negatives if features.get(name) == "text"]:
        raise UserError(
            f"{data}: {texts[0]!r} holds texts, and hard negatives of captions are images; if these are ids of other "
            "rows, put the images of those rows in their place"
        )
    image = named["image"] or _only([name for name in images if name not in negatives], data, "image")
    if not image:
        return Columns(language=named["language"], labels=kinds.labels)
    language = named["language"] or _first(_LANGUAGE, names)
    read = [name for name in names if features[name] in ("text", "bytes")]
    long = named["long"] or _first(_LONG, read)
    captions = named["captions"].split(",") if named["captions"] else []
    if not captions:
        texts = [name for name in read if name not in (image, language, long)]
        usual = _first(_CAPTIONS, texts)
        captions = [usual] if usual else []
        if not usual and not long:
            texts = [name for name in texts if features[name] == "text"]
            others = [name for name in texts if name.lower().rpartition("_")[2] not in _NO_CAPTIONS]
            captions = [_only(others, data, "caption")]
            if not captions[0]:
                raise UserError(f"{data}: no column of texts beside {image!r}; it has {', '.join(names)}")
    used = [image, *captions, long, language, *negatives]
    needed = [name if name in features else name.partition(".")[0] for name in used if name]
    return Columns(image, captions, long, language, list(dict.fromkeys(needed)), negatives=negatives)


def usual_negatives(names: Collection[str]) -> list[str]:
    """Those of a table's columns that hold hard-negative images by their names."""
    return [name for name in names if _NEGATIVE.fullmatch(name.lower())]


def is_image_name(name: str, beside: Collection[str] = ()) -> bool:
    """Whether a column of bytes is one of images, by its name, or as negatives among columns `beside` with images."""
    if name.lower() in ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo"):
        return True
    return _NEGATIVE.fullmatch(name.lower()) is not None and any(map(is_image_name, beside))


def value_at(row: JsonObject, name: str) -> Any:
    """The value of a column, or of a field of one: "json.caption"; of a list of objects those of all. None if it is not
    there."""
    if name in row:
        return row[name]
    value: Any = row
    for step in name.split("."):
        if isinstance(value, list):
            value = [each.get(step) for each in value if isinstance(each, dict)]
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def caption_texts(value: Any, language: str, role: str, origin: str) -> list[Text] | None:
    """The captions that a value holds, word for word, without empty ones; None if it holds something else.

    A value is a text (or its bytes), an object with a text (and perhaps its language), an object of texts by language,
    or a list.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [Text(value, house_language(language), role, origin)] if value.strip() else []
    if isinstance(value, dict):
        text = next((value[name] for name in _TEXT if isinstance(value.get(name), str)), None)
        if text is not None:
            own = next((value[name] for name in _LANGUAGE if isinstance(value.get(name), str)), language)
            return caption_texts(text, own, role, origin)
        by_code = {code: each for code, each in value.items() if code != "default"}  # one of the others again
        if not by_code or not all(map(is_code, by_code)):  # {"user": …, "assistant": …}
            return None
        parts = [caption_texts(each, code, role, origin) for code, each in by_code.items()]
    elif isinstance(value, list):
        parts = [caption_texts(each, language, role, origin) for each in value]
    else:
        return None
    return None if None in parts else [text for part in parts for text in part or ()]


def _first(usual: Sequence[str], names: Sequence[str]) -> str:
    return next((name for name in usual if name in names), "")


def _only(names: list[str], data: str, what: str) -> str:
    if len(names) > 1:
        raise UserError(f"{data}: {what} may be {' or '.join(names)}; say --{what}-column")
    return names[0] if names else ""
