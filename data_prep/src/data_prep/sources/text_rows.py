"""Rows of texts in the forms of the Hugging Face hub: translations, judged passages, pairs and triplets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_prep.errors import UserError
from data_prep.languages import house_language
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.judged import Judged, Passage, judged
from data_prep.sources.records import Dropped, Found, NoMatch, Noted, Row, TextRecord
from data_prep.sources.texts import Texts

_LANGUAGE = ("language", "lang", "locale")


@dataclass(frozen=True)
class TextRows:
    """How rows become text pairs and triplets.

    texts: reads pairs and triplets; its `language` (of a translation the two that are taken), `origin`, `negatives` and
    names of columns hold for the other forms, too. language_column: says the language of both texts of a row.

    Raises:
        UserError: the options contradict each other.
    """

    texts: Texts
    language_column: str = ""
    score_margin: float = 0.0

    def __post_init__(self) -> None:
        languages = self.texts.language.split(",")
        if len(languages) > 2 or not all(map(str.strip, languages)):
            raise UserError(f"--language {self.texts.language}: expected one language, or QUERY,TARGET (de,en)")
        if self.texts.negatives < 1:
            raise UserError(f"--negatives {self.texts.negatives}: expected at least 1")

    def records(self, where: str, row: Any) -> Iterator[Found | NoMatch]:
        """What a row gives: an object, or a list as `import texts` knows it."""
        if not isinstance(row, dict):
            yield from self.texts.record(where, row)
            return
        translation = row.get("translation")
        if isinstance(translation, dict):
            yield self._translated(where, translation)
            return
        names = (self.language_column,) if self.language_column else _LANGUAGE
        said = next((row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()), "")
        found = self._judged(row)
        if isinstance(found, str):
            yield Dropped(found, where)
        elif found is not None:
            yield from self.record(where, found, said)
        else:
            yield from (replace(self.texts, language=said) if said else self.texts).record(where, row)

    def labelled(self, rows: Iterable[Row | Dropped]) -> bool:
        """As `Texts.labelled`, of the rows whose labels are read: not those of judged passages, nor of ids."""
        return self.texts.labelled(
            row for row in rows if isinstance(row, Dropped) or not isinstance(row[1], dict) or not self._judged(row[1])
        )

    def _judged(self, row: JsonObject) -> Judged | str | None:
        """A row's query and judged passages, or why it is of no use; None if it has another form."""
        named = any((self.texts.query_column, self.texts.target_column, self.texts.negative_columns))
        found = None if named or self.texts.graded == "sts" else judged(row, self.score_margin)
        if found is None and not named and {"query_id", "positive_id"} <= row.keys() and "query" not in row:
            return "ids in place of texts; take the configuration with the texts, or join them"
        return found

    def record(self, where: str, found: Judged, language: str = "") -> Iterator[Found]:
        """A pair or triplet of a query and its judged passages, in `language` (default: as the options say)."""
        if not found.query.strip():
            yield Dropped("empty text", where)
            return
        if found.left_out:
            yield Noted("negatives left out: empty, equal to the positive, or scored nearly as high", found.left_out)
        first, _, second = (language or self.texts.language).partition(",")
        enough = len(found.negatives) >= self.texts.negatives
        if found.negatives and not enough:
            yield Noted(f"with fewer than {self.texts.negatives} negatives, as pairs")
        yield TextRecord(
            where,
            [Text(found.query, first, "body", self.texts.origin)],
            [self._text(passage, second or first) for passage in found.positives],
            [[self._text(passage, second or first)] for passage in found.negatives[: self.texts.negatives]]
            if enough
            else None,
            scores=found.scores(self.texts.negatives) if enough else None,
        )

    def _text(self, passage: Passage, language: str) -> Text:
        joined = passage.joined and self.texts.origin == "human"
        return Text(passage.text, language, "body", "human:joined" if joined else self.texts.origin)

    def _translated(self, where: str, value: JsonObject) -> Found:
        """A pair of {"en": text, "de": text}, or of the library's TranslationVariableLanguages."""
        languages, texts = value.get("language"), value.get("translation")
        if not isinstance(languages, list) or not isinstance(texts, list):
            languages, texts = list(value), list(value.values())
        alternatives: dict[str, list[str]] = {}
        for language, text in zip(languages, texts, strict=False):
            if isinstance(text, str) and isinstance(language, str):
                alternatives.setdefault(house_language(language), []).append(text)
        wanted = (
            list(map(house_language, self.texts.language.split(",")))
            if "," in self.texts.language
            else list(alternatives)
        )
        if "," not in self.texts.language and len(wanted) > 2:
            return Dropped("translation into several languages: say --language QUERY,TARGET", where)
        if len(wanted) < 2 or not all(code in alternatives for code in wanted):
            return Dropped("translation without both languages", where)
        parts = [[Text(text, code, "body", self.texts.origin) for text in alternatives[code]] for code in wanted]
        if not all(text.text.strip() for part in parts for text in part):
            return Dropped("empty text", where)
        return TextRecord(where, parts[0], parts[1])
