"""Questions and answers about an image as its captions: the question followed by the answer."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.folder import inside
from data_prep.sources.records import Dropped, Found, ImageRecord, Row, objects

_OPTION = re.compile(r"\s*\(?([A-Za-z])(?:[).:]\s*|$)")  # "B", "(B)", "B) text", "B. text"


def answer_text(value: object) -> str:
    """An answer as text: a string, a number, or a list of either; "" if there is none."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(answer_text, value)))
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return value.strip() if isinstance(value, str) else str(value) if isinstance(value, int | float) else ""


def listed(value: object) -> object:
    """Parse a list that is stored as the text of a Python list ("['A', 'B']"); other values are returned unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
        return found if isinstance(found, list) else value
    return value


def chosen(label: object, options: object) -> object:
    """The text of the option that a letter stands for ("B", "(b)", "B) 3.5"); other labels are returned unchanged."""
    match = _OPTION.match(label) if isinstance(label, str) else None
    if match is None or not isinstance(options, list):
        return label
    place = ord(match[1].upper()) - ord("A")
    if place >= len(options) or not isinstance(options[place], str):
        return label
    return re.sub(r"^\s*\(?[A-Za-z][).:]\s*", "", options[place]) or options[place]


def question_caption(question: object, answer: str, *, where: str, origin: str, language: str = "en") -> Text | Dropped:
    """The caption for a question and its answer."""
    if not isinstance(question, str) or not question.strip():
        return Dropped("no question", where)
    if not answer:
        return Dropped("no answer", where)
    return Text(f"{question.strip()} {answer}", language, "long", origin)


def by_image(
    rows: Iterable[Row | Dropped],
    question: Callable[[str, JsonObject], tuple[object, Text | Dropped]],
    folder: Path,
) -> Iterator[Found]:
    """One record for consecutive rows about one image in `folder`; each is one of its captions.

    `question` gives the image's name and the caption of a row (place, fields).
    """
    asked = ((r.where, None, r) if isinstance(r, Dropped) else (r[0], *question(*r)) for r in objects(rows))
    for name, group in groupby(asked, key=lambda one: one[1] if isinstance(one[1], str) else None):
        path = inside(folder, name) if name else None
        captions: list[Text] = []
        first = ""
        for where, _, caption in group:
            first = first or where
            if isinstance(caption, Dropped):
                yield caption
            elif path is None:
                reason = "file name outside the folder" if name else "no image name"
                yield Dropped(reason, where, content=caption.text)
            else:
                captions.append(caption)
        if captions and path is not None:
            yield ImageRecord(first, str(name), path, long=list(dict.fromkeys(captions)))
