"""Prompts in thirty languages.

They are the files `prompts/VERSION/LANGUAGE.txt`. A version must not change once captions were made with it: add a
folder instead. The ledger stores every prompt's hash and refuses to continue with another text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from data_prep.languages import LANGUAGES, house_language
from data_prep.names import check_name

PROMPTS = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Prompt:
    """The prompt in one language; sha256 is that of `text`."""

    version: str
    language: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_prompt(version: str, language: str, folder: Path = PROMPTS) -> Prompt:
    """The prompt of a version in a language.

    Raises:
        UserError: there is no such version or language, or the file is empty or not UTF-8.
    """
    path = folder / check_name(version, "prompt version") / f"{language}.txt"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); convert it (`iconv -t UTF-8`)") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        versions = sorted(found.name for found in folder.glob("*") if found.is_dir())
        raise UserError(
            f"no prompt {path}; there are the versions {', '.join(versions) or '(none)'} in {folder}, each with a file "
            "LANGUAGE.txt a language"
        ) from error
    if not text:
        raise UserError(f"{path} is empty; write the prompt into it")
    return Prompt(version, language, text)


def check_languages(languages: list[str]) -> list[str]:
    """The languages themselves, "all" being the thirty; UserError for one that is not among them."""
    if languages == ["all"]:
        return list(LANGUAGES)
    unknown = [language for language in languages if house_language(language) not in LANGUAGES]
    if unknown:
        raise UserError(f"unknown language {unknown[0]!r}; there are {' '.join(LANGUAGES)}, or all")
    return list(dict.fromkeys(map(house_language, languages)))
