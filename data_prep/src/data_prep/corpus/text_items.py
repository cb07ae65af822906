"""Text items: descriptions of Debian packages and GNOME's help pages, each with their translations."""

from __future__ import annotations

import hashlib
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from data_prep.corpus.deb import Package, parse_xml, read_members, read_translations
from data_prep.corpus.items import TextItem, normalized
from data_prep.languages import LANGUAGES, OTHER_CODES
from data_prep.samples import Text, clean

_PACKAGE_CHARACTERS = 400  # of whole paragraphs: what fits the context of a laptop model
_HELP_CHARACTERS = 2000  # of whole paragraphs
_SHORTEST_BODY = 80  # characters; shorter help pages are lists of links
_PAGE = re.compile(r"usr/share/help/([A-Za-z_]+)/([a-z-]+)/([A-Za-z0-9_-]+)\.page")
_MALLARD = "{http://projectmallard.org/1.0/}"


def read_packages(
    translations: dict[str, list[Path]], *, limit: int, seed: int
) -> tuple[list[TextItem], dict[str, int]]:
    """Descriptions that exist in English and in another language, at most `limit` of them; and what was left out.

    query: titles in all languages; target: titles and bodies in all languages. If there are more than
    `limit`, a hash of `seed` and the description selects. Packages with equal English titles or bodies are a family.
    """
    found: dict[str, dict[str, tuple[str, str]]] = {}
    seen: set[str] = set()
    for language, paths in translations.items():
        for path in paths:
            for _, md5, title, body in read_translations(path):
                if language == "en":
                    seen.add(md5)
                found.setdefault(md5, {}).setdefault(language, (clean(title), first_paragraphs(body)))
    several = {md5: texts for md5, texts in found.items() if "en" in texts and len(texts) > 1}
    ranked = sorted(several, key=lambda md5: hashlib.sha256(f"{seed}:{md5}".encode()).digest())
    dropped = {"in English only": len(seen) - len(several), f"over the limit of {limit}": max(0, len(several) - limit)}
    return [_package_item(md5, several[md5]) for md5 in ranked[:limit]], dropped


def first_paragraphs(body: str) -> str:
    """As many whole paragraphs from the start as fit; the first one always."""
    kept = ""
    for paragraph in body.split("\n\n"):
        longer = clean(f"{kept} {paragraph}")
        if kept and len(longer) > _PACKAGE_CHARACTERS:
            break
        kept = longer
    return kept


def _package_item(md5: str, texts: dict[str, tuple[str, str]]) -> TextItem:
    english_title, english_body = texts["en"]
    query, target = [], []
    for language, (title, body) in texts.items():
        query.append(Text(title, language, "title"))
        target.append(Text(title, language, "title"))
        if body:
            target.append(Text(body, language, "body"))
    labels = [f"package:{md5}", f"title:{normalized(english_title)}"]
    if english_body:
        labels.append(f"body:{normalized(english_body)}")
    return TextItem(f"package-{md5}", "packages", tuple(labels), tuple(query), tuple(target))


def read_help(package: Package) -> tuple[list[TextItem], dict[str, int]]:
    """One item a page: query is its title and description, target its body, each in all languages that have it."""
    pages: dict[str, dict[str, tuple[str, str]]] = {}
    dropped = {"too short or not readable": 0, "not translated": 0}
    for path, data in read_members(package, lambda path: _help_language(path) is not None).items():
        language, page = _help_language(path), "-".join(_PAGE.fullmatch(path).groups()[1:])  # type: ignore[union-attr]
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
        root = parse_xml(data)
    except ValueError:
        return None
    title = _text_of(root.find(f"{_MALLARD}title"))
    description = _text_of(root.find(f"{_MALLARD}info/{_MALLARD}desc"))
    body = ""
    for element in root:
        if element.tag == f"{_MALLARD}info":
            continue
        for paragraph in element.iter(f"{_MALLARD}p"):
            longer = f"{body} {_text_of(paragraph)}".strip()
            if body and len(longer) > _HELP_CHARACTERS:
                break
            body = longer
    if not title or len(body) < _SHORTEST_BODY:
        return None
    return f"{title.rstrip('.')}. {description}".strip() if description else title, body


def _text_of(element: ET.Element | None) -> str:
    return "" if element is None else clean("".join(element.itertext()))


def _help_language(path: str) -> str | None:
    match = _PAGE.fullmatch(path)
    if match is None:
        return None
    code = "en" if match[1] == "C" else OTHER_CODES.get(match[1], match[1])
    return code if code in LANGUAGES else None
