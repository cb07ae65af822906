"""The Debian Reference in nine languages: the headings of its sections, and what they say."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from data_prep.corpus.deb import Package, read_members
from data_prep.corpus.items import TextItem
from data_prep.corpus.text_items import first_paragraphs
from data_prep.samples import Text, clean

PACKAGES = {f"debian-reference-{code}": code.partition("-")[0] for code in "de en es fr id it ja pt zh-cn".split()}  # noqa: SIM905
"""Package → language."""

# <h3 class="title"><a id="_the_root_account"/>1.1.3. The root account</h3>; ids are the same in all languages.
_HEADING = re.compile(r'<h[23] class="title"[^>]*><a id="([^"]+)"\s*/>(.*?)</h[23]>', re.DOTALL)
_PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.DOTALL)
_NUMBER = re.compile(r"^\s*[\d.]+\s*")
_TAG = re.compile(r"<[^>]*>")
_SHORTEST = 80  # characters; shorter sections are lists and tables


def read_handbook(packages: Iterable[Package]) -> tuple[list[TextItem], dict[str, int]]:
    """One item a section that is there in English: query is its heading, target the text, each in all languages."""
    sections: dict[str, dict[str, tuple[str, str]]] = {}
    for package in packages:
        for path, data in read_members(package, lambda path: path.endswith(".html") and "/ch" in path).items():
            chapter = PurePosixPath(path).name.partition(".")[0]
            for anchor, heading, text in read_sections(data.decode("utf-8", errors="replace")):
                found = sections.setdefault(f"{chapter}-{anchor}", {})
                found.setdefault(PACKAGES[package.name], (heading, text))
    items = []
    for section, by_language in sorted(sections.items()):
        if len(by_language.get("en", ("", ""))[1]) >= _SHORTEST and len(by_language) > 1:
            query = tuple(Text(heading, code, "title") for code, (heading, _) in sorted(by_language.items()))
            target = tuple(Text(text, code, "body") for code, (_, text) in sorted(by_language.items()) if text)
            # Ids are longer than a sample's key may be.
            name = "handbook-" + hashlib.sha256(section.encode()).hexdigest()[:16]
            labels = (f"handbook:{section}", f"body:{by_language['en'][1]}")
            items.append(TextItem(name, "handbook", labels, query, target))
    return items, {"too short or not in English": len(sections) - len(items)}


def read_sections(page: str) -> list[tuple[str, str, str]]:
    """(id, heading without its number, first paragraphs) of each section of a page of the handbook."""
    found = list(_HEADING.finditer(page))
    ends = [match.start() for match in found[1:]] + [len(page)]
    sections = []
    for match, end in zip(found, ends, strict=True):
        paragraphs = [_plain(paragraph) for paragraph in _PARAGRAPH.findall(page[match.end() : end])]
        sections.append((match[1], _NUMBER.sub("", _plain(match[2])), first_paragraphs("\n\n".join(paragraphs))))
    return sections


def _plain(markup: str) -> str:
    return clean(html.unescape(_TAG.sub(" ", markup)))
