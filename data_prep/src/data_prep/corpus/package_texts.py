"""Descriptions of Debian packages: titles and bodies with their translations."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data_prep.corpus.deb import read_translations
from data_prep.corpus.items import TextItem, normalized
from data_prep.samples import Text, clean

_BODY_CHARACTERS = 400  # of whole paragraphs: what fits the context of a laptop model


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
    return [_item(md5, several[md5]) for md5 in ranked[:limit]], dropped


def first_paragraphs(body: str) -> str:
    """As many whole paragraphs from the start as fit; the first one always."""
    kept = ""
    for paragraph in body.split("\n\n"):
        longer = clean(f"{kept} {paragraph}")
        if kept and len(longer) > _BODY_CHARACTERS:
            break
        kept = longer
    return kept


def _item(md5: str, texts: dict[str, tuple[str, str]]) -> TextItem:
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
