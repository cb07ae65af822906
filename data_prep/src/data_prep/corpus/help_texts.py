"""GNOME's help pages: title, description and body, in many languages."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from data_prep.corpus.deb import Package, read_members
from data_prep.corpus.items import TextItem, normalized
from data_prep.languages import LANGUAGES, OTHER_CODES
from data_prep.samples import Text, clean

_PAGE = re.compile(r"usr/share/help/([A-Za-z_]+)/([a-z-]+)/([A-Za-z0-9_-]+)\.page")
_MALLARD = "{http://projectmallard.org/1.0/}"
_BODY_CHARACTERS = 2000  # of whole paragraphs
_SHORTEST_BODY = 80  # characters; shorter pages are lists of links


def read_help(package: Package) -> tuple[list[TextItem], dict[str, int]]:
    """One item a page: query is its title and description, target its body, each in all languages that have it."""
    pages: dict[str, dict[str, tuple[str, str]]] = {}
    dropped = {"too short or not readable": 0, "not translated": 0}
    for path, data in read_members(package, lambda path: _language(path) is not None).items():
        language, page = _language(path), "-".join(_PAGE.fullmatch(path).groups()[1:])  # type: ignore[union-attr]
        texts = read_page(data)
        if texts is None:
            dropped["too short or not readable"] += 1
        else:
            assert language is not None
            pages.setdefault(page, {}).setdefault(language, texts)
    items = []
    for page, texts_by_language in sorted(pages.items()):
        english = texts_by_language.get("en")
        if english is None:
            continue
        query, target = [], []
        for language, (head, body) in sorted(texts_by_language.items()):
            if language != "en" and (head == english[0] or body == english[1]):
                dropped["not translated"] += 1
                continue
            query.append(Text(head, language, "title"))
            target.append(Text(body, language, "body"))
        labels = (f"help:{page}", f"title:{normalized(english[0])}", f"body:{normalized(english[1])}")
        items.append(TextItem(f"help-{page}", "help", labels, tuple(query), tuple(target)))
    return items, dropped


def read_page(data: bytes) -> tuple[str, str] | None:
    """(title and description, body) of a Mallard page; None if it is too short or no page."""
    try:
        root = ET.fromstring(data)
    except ET.ParseError:
        return None
    title = _text(root.find(f"{_MALLARD}title"))
    description = _text(root.find(f"{_MALLARD}info/{_MALLARD}desc"))
    body = ""
    for element in root:
        if element.tag == f"{_MALLARD}info":
            continue
        for paragraph in element.iter(f"{_MALLARD}p"):
            longer = f"{body} {_text(paragraph)}".strip()
            if body and len(longer) > _BODY_CHARACTERS:
                break
            body = longer
    if not title or len(body) < _SHORTEST_BODY:
        return None
    return f"{title.rstrip('.')}. {description}".strip() if description else title, body


def _text(element: ET.Element | None) -> str:
    return "" if element is None else clean("".join(element.itertext()))


def _language(path: str) -> str | None:
    match = _PAGE.fullmatch(path)
    if match is None:
        return None
    code = "en" if match[1] == "C" else OTHER_CODES.get(match[1], match[1])
    return code if code in LANGUAGES else None
