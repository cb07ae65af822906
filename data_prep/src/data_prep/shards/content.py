"""What makes a sample usable.

`index`, `validate`, `inspect`, the curation passes and the trainer all ask here, so that none of them takes a sample
that another one stumbles over.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_prep.shards.format import (
    IMAGE_TRIPLETS,
    IMAGE_TYPES,
    KINDS,
    JsonObject,
    ShardError,
    negatives_among,
    parse_json,
)

_NUL = "NULs between its letters, as UTF-16 has where it is taken for UTF-8"
_LANGUAGE = re.compile(r"(?P<code>[a-z]{2})([_-][A-Za-z]{2,4})*")  # of three letters may be "alt", "raw" or "url"
_CODES = (
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo "
    "es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka "
    "kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng "
    "nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su "
    "sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)
"""ISO 639-1."""
_UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Zs")  # categories of Unicode


class Unusable(ShardError):
    """A sample that cannot serve as one of its kind.

    Attributes:
        reason: why, in one of a few fixed phrases; the error's text goes on with what was found.
    """

    def __init__(self, reason: str, found: str = ""):
        super().__init__(reason + found)
        self.reason = reason


def content_of(kind: str, members: Mapping[str, bytes], language: str = "und") -> JsonObject:
    """The texts of a sample, as its kind has them: `captions` of an image, or `query` and `target` (and `negatives`).

    Every list of texts has one or more, and every text has a `text` and a `language`. `origin` and `role`, of the
    sample its `item`, `score` and `scores`, are as the format has them where they are there at all. A .txt is a
    caption; it counts where there is no .json of the format, as img2dataset's is none.

    Args:
        kind: one of `KINDS`.
        members: the sample's members by extension, as `Dataset.read` returns them.
        language: of a .txt; it does not say itself.

    Raises:
        Unusable: the sample is not of its kind.
    """
    if kind.startswith("image") and not any(extension in members for extension in IMAGE_TYPES):
        raise Unusable("no image", f" among {', '.join(IMAGE_TYPES)}")
    if kind == IMAGE_TRIPLETS:
        negative_images(kind, members)
    try:
        return _checked(kind, members)
    except Unusable:
        if "txt" not in members or not kind.startswith("image"):
            raise
        try:
            text = members["txt"].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Unusable("caption that is not UTF-8", f" ({error.reason} at byte {error.start})") from None
        if "\0" in text:
            raise Unusable("caption with a NUL, as padding has, or UTF-16 that is taken for UTF-8") from None
        if is_blank(text):
            raise Unusable("no caption: its .txt is empty") from None
        return {"captions": [_caption(kind, text, language)]}


def negative_images(kind: str, members: Mapping[str, bytes]) -> list[bytes]:
    """The encoded hard-negative images of a sample, in their order; of other kinds than `image-triplets` none.

    Raises:
        Unusable: there are none, or one between them is missing.
    """
    if kind != IMAGE_TRIPLETS:
        return []
    found = negatives_among(members)
    if not found or len(found) < sum(extension.startswith("negative-") for extension in members):
        raise Unusable("no negative images negative-0, negative-1, …", f" but {_seen(sorted(members))}")
    return [members[extension] for extension in found]


def _is_wide(text: str) -> bool:
    """Whether a text is UTF-16 that was taken for UTF-8, in which every second letter, in Latin, is a NUL."""
    return text.count("\0") * 3 > len(text)


def named_texts(fields: Any, names: Sequence[str]) -> list[tuple[str, str]]:
    """The texts that a .json of others has under `names`, word for word, each once, without empty ones.

    With each the language that it is said to be in, "" for none: what a name leads to is a text, a list of texts, or
    texts by language ({"en": …, "pt-BR": […]}). A name is a field's, or a path of names: "meta.alt" is `alt` of `meta`,
    or of every object in the list `meta`.
    """
    found: dict[str, str] = {}
    for name in names:
        exact = isinstance(fields, dict) and name in fields
        values = [fields]
        for step in [name] if exact else name.split("."):
            values = _flat([value[step] for value in values if isinstance(value, dict) and step in value])
        for value in values:
            for code, text in _by_language(value):
                if isinstance(text, str) and not is_blank(text):
                    found.setdefault(text, code)
    return list(found.items())


def _by_language(value: Any) -> Iterator[tuple[str, Any]]:
    """(language, text) of each text of an object by language; of anything else ("", value)."""
    if not isinstance(value, dict):
        yield "", value
    elif all((match := _LANGUAGE.fullmatch(code)) and match["code"] in _CODES.split() for code in value):
        for code, texts in value.items():
            yield from ((code[:2], text) for text in _flat([texts]))


def with_named_captions(kind: str, members: Mapping[str, bytes], names: Sequence[str]) -> dict[str, bytes]:
    """The members of a sample, their .json turned into one of the format: its captions are those of `named_texts`.

    A .json without any becomes one without captions, which `content_of` refuses.
    """
    try:
        texts = named_texts(parse_json(members.get("json", b"{}")), names)
    except ValueError:
        return dict(members)
    captions = [_caption(kind, text, code or "und") for text, code in texts]
    # Half a character stays an escape, so that `content_of` finds it.
    return {**members, "json": json.dumps({"captions": captions}).encode()}


def _caption(kind: str, text: str, language: str) -> JsonObject:
    role = "long" if kind == "image-long" else "name"
    return {"text": text, "language": language, "origin": "human", "role": role}


def _flat(values: list[Any]) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, list) else [value])]


def is_language(name: str) -> bool:
    """Whether a text may stand as a language: it becomes a part of names, of scalars too."""
    return name.isprintable() and "/" not in name and name.strip() != ""


def texts_in(kind: str, content: JsonObject) -> Iterator[tuple[str, list[JsonObject]]]:
    """(part, alternative texts) of what `content_of` returned; of a triplet each negative is one."""
    for part in KINDS[kind]:
        for texts in content[part] if part == "negatives" else [content[part]]:
            yield part, texts


def _checked(kind: str, members: Mapping[str, bytes]) -> JsonObject:
    parts = KINDS[kind]
    if "json" not in members:
        image = kind.startswith("image")
        raise Unusable("no caption (.txt, or .json with captions)" if image else f"no .json with {' and '.join(parts)}")
    try:
        content: Any = parse_json(members["json"])
    except ValueError as error:
        raise Unusable("its .json is not JSON", f" ({error})") from error
    for part in parts:
        texts = content.get(part) if isinstance(content, dict) else None
        if not isinstance(texts, list) or not texts:
            raise Unusable(f"its .json has no {part}", f", which {kind} needs as a list; it holds {_seen(content)}")
        for alternatives in texts if part == "negatives" else [texts]:
            _check_texts(f"its {part}", alternatives)
    _check_rest(content)
    return content  # type: ignore[no-any-return]


def _check_texts(part: str, texts: Any) -> None:
    if not isinstance(texts, list) or not texts:
        raise Unusable(f"one of {part} is no list of texts", f" but {_seen(texts)}")
    for text in texts:
        if not isinstance(text, dict):
            raise Unusable(f"a text of {part} is no object", f' with "text" and "language" but {_seen(text)}')
        for field in ("text", "language"):
            if not isinstance(text.get(field), str) or is_blank(text[field]):
                raise Unusable(f"a text of {part} lacks {field}", f", which is {_seen(text.get(field))}")
        for field in ("text", "language", "origin", "role"):
            value = text.get(field, "")
            if not isinstance(value, str):
                raise Unusable(f"{field} of a text of {part} is no text", f" but {_seen(value)}")
            if not encodes(value):
                raise Unusable(f"{field} of a text of {part} has half a character", " (a lone surrogate)")
            if _is_wide(value):
                raise Unusable(f"{field} of a text of {part} has {_NUL}")
        if not is_language(text["language"]):
            raise Unusable(f"language of a text of {part} is none", f" but {_seen(text['language'])}")


def _check_rest(content: JsonObject) -> None:
    """`item`, `score` and `scores`; an `item` of null is none."""
    if content.get("item", "") is None:
        del content["item"]
    if not isinstance(content.get("item", ""), str | int):
        raise Unusable("its item is neither text nor number", f" but {_seen(content['item'])}")
    score = content.get("score", 0)
    if not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
        raise Unusable("its score is no number", f" but {_seen(score)}")
    if "negatives" in content and (scores := content.get("scores")) is not None:
        wanted = 1 + len(content["negatives"])
        if not isinstance(scores, list) or len(scores) != wanted or not all(map(_is_finite, scores)):
            raise Unusable("its scores are not one for the target and one for each negative", f" but {_seen(scores)}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: it is empty, or spaces, controls and marks of no width alone."""
    return not text.strip() or all(unicodedata.category(sign) in _UNSEEN for sign in text)


def encodes(text: str) -> bool:
    """Whether a text can be written: JSON's escapes may leave half a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _seen(value: Any) -> str:
    """A foreign value for a message: what it is, briefly, and nothing that a terminal or a file would choke on."""
    if isinstance(value, dict | list):
        shown = ascii(sorted(value)) if isinstance(value, dict) else f"a list of {len(value)}"
    else:
        shown = ascii(value[:80] if isinstance(value, str) else value)
    return shown if len(shown) <= 100 else f"{shown[:100]}…"
