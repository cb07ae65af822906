"""Columns that say whether two texts belong together (label), or how much (score): none is a positive against them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Number
from typing import Any

from data_prep.errors import UserError
from data_prep.shards.format import JsonObject
from data_prep.sources.records import pick

# What the options of sources that read labels say.
COLUMN = "column that says whether texts match, or how much (default: label, score, …); or none"
POSITIVES = "labels that say that texts match, with commas (default: 1, true, entailment, …)"
NO_MATCH = (
    "labels that say that texts do not match, with commas (default: 0, false, contradiction, …): hard negatives of the "
    "matches of their query; none: drop them"
)
SCALE = "score of texts that say the same"
LEAST = "share of the scale from which on a pair is a positive; others are dropped"
GRADED = "sts: keep all pairs that have a score, with it, to evaluate on or to rank in training"

_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")  # of a name: is_duplicate, isDuplicate, IS DUPLICATE
_LABELS = {
    *("label", "labels", "duplicate", "paraphrase", "match", "relevant", "equivalent", "judgment", "judgement"),
    *("gold", "truth", "verdict", "dup", "duplicates", "paraphrases", "matches", "equivalence", "entailment"),
}
_IS = {"similar", "related", "positive", "same", "correct"}  # labels behind is_ and are_ alone
_SCORES = {"score", "similarity", "relatedness", "relevance", "rel", "cosine", "sim", "sts", "rating", "grade"}
# Words of columns that are the larger, or true, the less two texts have in common: alone, and with one of the above.
_DISTANCES = {"distance", "dissimilarity", "divergence", "mismatch", "ter", "wer", "cer"}
_NOT = {
    "not",
    "non",
    "no",
    "dist",
    "different",
    "difference",
    "contradiction",
    "negative",
    "error",
    "loss",
    *_DISTANCES,
}
# Scores that say nothing about the pair.
_OTHERS = {"language", "lang", "lid", "toxicity", "nsfw", "aesthetic", "quality", "perplexity", "length"}
_YES = (
    *("true", "yes", "t", "y", "same", "related"),
    "match",
    "entailment",
    "duplicate",
    "paraphrase",
    "equivalent",
    "relevant",
    "positive",
    "similar",
)
_NO = (
    *("false", "no", "contradiction", "negative", "irrelevant", "different", "mismatch", "dissimilar"),
    *("f", "n", "unrelated", "not_similar", "not_related", "not_match", "not_paraphrase"),
    *("not_duplicate", "not_entailment", "not_equivalent", "not_relevant", "non-match", "no_match"),
)
_NEGATED = re.compile(r"(?:not?|non|isn't)[_-](?:an?_)?(?=.)")  # not_a_paraphrase, non-duplicate
_COMMA = re.compile(r"[+-]?(?:0,\d+|\d+,(?:\d\d?|\d{4,}))")  # 0,95; 1,000 may be a thousand
_NEITHER = ("neutral",)
_NONE = ("", "-", "-1", "nan", "null", "none")  # as SNLI writes pairs on which people did not agree


@dataclass(frozen=True)
class Judgement:
    """What a row says of its pair. right: whether it is a positive; reason: why not. grade: the score as it stands in
    the row, None for a label. against: a label says that the texts do not match."""

    right: bool
    reason: str = ""
    grade: float | None = None
    against: bool = False


@dataclass(frozen=True)
class Labels:
    """How labels and scores are read.

    column: of the label or score; "" for the usual names, "none" for no such column. positives: the labels that say
    yes, in place of 1, true, entailment and the like. no_match: those that say no, in place of 0, false, contradiction
    and the like; other labels say neither. scale: the score of equal texts. least: the share of it from
    which on a pair is a positive. graded: all numbers are scores, 0 and 1 as well. texts: columns that hold the texts.

    Raises:
        UserError: least and scale can be none.
    """

    column: str = ""
    positives: tuple[str, ...] = ()
    no_match: tuple[str, ...] = ()
    scale: float = 1.0
    least: float = 0.8
    graded: bool = False
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise UserError(f"--min-score {self.least:g}: expected a share of --score-scale, above 0 and up to 1")
        if not 0 < self.scale < math.inf:
            raise UserError(f"--score-scale {self.scale:g}: expected the score of equal texts, such as 1, 5 or 100")

    def columns(self, names: Iterable[str]) -> list[str]:
        """Those of a table's columns that say it."""
        if self.column:
            return [] if self.column == "none" else [self.column]
        return [name for name in names if says_match(name) and name not in self.texts]

    def judge(self, row: JsonObject, where: str) -> Judgement | None:
        """What a row says; None if it has no such column. All its columns have to say yes.

        Raises:
            UserError: a number says nothing, as it is not on the scale; the numbers before it were misread then. Or a
                column says by its name how different texts are.
        """
        names = [name for name in self.columns(row) if name in row or (self.column and name.partition(".")[0] in row)]
        found = [self._one(name, pick(row, name, ()), row, where) for name in names]
        wrong = next((one for one in found if not one.right), None)
        graded = next((one.grade for one in found if one.grade is not None), None)
        if wrong is not None:
            return Judgement(False, wrong.reason, graded, wrong.against)
        return Judgement(True, grade=graded) if found else None

    def contradicts(self, row: JsonObject) -> bool:
        """Whether a label of a row says that its texts do not match; scores do not count."""
        said = [said_of(row[name]) for name in self.columns(row) if _is_label(name) and not _is_turned(name)]
        return any(is_no(one) or number_of(one) == 0 for one in said)

    def check_classes(self, rows: Iterable[tuple[str, JsonObject]]) -> None:
        """UserError if a label beside a positive is 0 in some rows and a class in others: 0 would be taken for no."""
        found: dict[str, dict[str, str]] = {}
        for where, row in rows:
            for name in self.columns(row):
                if name in row and _is_label(name) and not self.positives and not self.no_match:
                    found.setdefault(name, {}).setdefault(said_of(row[name]), where)
        for name, said in found.items():
            numbers = {number_of(one) for one in said}
            if 0 in numbers and (strange := next((one for one in said if number_of(one) not in (0, 1, None)), None)):
                raise UserError(
                    f"{said[strange]}: {name} is {strange}, in other rows 0, which would mean that a pair is no match; "
                    "say the labels that match (--positives 1), or --label-column none if it says nothing of the pair"
                )

    def _one(self, name: str, value: Any, row: JsonObject, where: str) -> Judgement:
        said = said_of(value)
        if _is_turned(name) and (self.graded or not self.positives):
            raise UserError(
                f"{where}: {name} is {said}; by its name it says how different the texts are. Say the labels that "
                "match (--positives 0), or which column counts: --label-column NAME, of a score one that is larger "
                "the more alike they are, or --label-column none"
            )
        if _among(said, self.positives):
            return Judgement(True)
        if _among(said, self.no_match):
            return Judgement(False, "labelled as no match", against=True)
        if self.positives:
            against = not self.no_match and (is_no(said) or number_of(said) == 0)
            return Judgement(False, "labelled as no match", against=against)
        if said in _NONE:
            return Judgement(False, "without a label or score")
        number = float(value) if isinstance(value, bool) else number_of(said)
        if number is None and said.endswith("%") and (share := number_of(said.rstrip("%_"))) is not None:
            number = share / 100 * self.scale
        if number is None:
            known = said in (*_YES, *_NEITHER) or is_no(said)
            reason = "labelled as no match" if known else "label that is not known; say --positives"
            against = is_no(said) and not self.no_match
            return Judgement(said in _YES, "" if said in _YES else reason, against=against)
        if {"premise", "hypothesis"} & {column.lower() for column in row} and _is_label(name):
            raise UserError(
                f"{where}: {name} is {said}, and which number is entailment differs between sets of premises and "
                "hypotheses; say the labels that match: --positives 0"
            )
        if not 0 <= number <= self.scale:
            raise UserError(
                f"{where}: {name} is {said}; expected 0 to {self.scale:g}. If it is a score, say that of equal texts "
                "(--score-scale 5); if it is a class, the labels that match (--positives 0); if it says nothing about "
                "the pair, --label-column none"
            )
        whether = number in (0, 1) and self.scale == 1 and not self.graded and _is_label(name)
        grade = None if isinstance(value, bool) or whether else number
        if number >= self.least * self.scale:
            return Judgement(True, grade=grade)
        if grade is not None:
            return Judgement(False, "score below --min-score", grade)
        return Judgement(False, "labelled as no match", against=not self.no_match)


def said_of(value: Any) -> str:
    """A label as it is compared; of a value that is none a text that no label is."""
    return str(value).strip().lower().replace(" ", "_") if isinstance(value, str | Number) else ""


def is_yes(said: str) -> bool:
    """Whether a label says that texts match; a number does not."""
    return said in _YES


def is_no(said: str) -> bool:
    """Whether a label says that texts do not match; a number does not."""
    return said in _NO or (_NEGATED.sub("", said, count=1) in _YES and said not in _YES)


def is_known(said: str) -> bool:
    """Whether a text is a label: that texts match, do not, or neither, or that nobody knows."""
    return is_yes(said) or is_no(said) or said in (*_NEITHER, *_NONE)


def says_match(name: str) -> bool:
    """Whether a column says by its name whether two texts match, or how much."""
    return _is_label(name) or _is_score(name) or _is_turned(name)


def says_other(name: str) -> bool:
    """Whether a column says by its name something that is not about the pair: how toxic a text is, how long."""
    return bool(_OTHERS & _words(name))


def _words(name: str) -> set[str]:
    return {word.lower() for word in _WORDS.findall(name)}


def _is_label(name: str) -> bool:
    words = [word.lower() for word in _WORDS.findall(name)]
    return bool(_LABELS & {*words}) or (len(words) == 2 and words[0] in ("is", "are") and words[1] in _IS)


def _is_score(name: str) -> bool:
    words = _words(name)
    return bool(_SCORES & words) and not _OTHERS & words


def _is_turned(name: str) -> bool:
    words = _words(name)
    return bool(_DISTANCES & words) or bool(_NOT & words and (_is_label(name) or _is_score(name)))


def _among(label: str, others: tuple[str, ...]) -> bool:
    return any(_alike(label, other.strip().lower()) for other in others)


def _alike(one: str, other: str) -> bool:
    """Whether two labels are one: 1 and 1.0 are."""
    return one == other or (number_of(one) is not None and number_of(one) == number_of(other))


def number_of(text: str) -> float | None:
    """The number that a label or score is, also with a decimal comma; None for everything else."""
    try:
        number = float(text.replace(",", ".") if _COMMA.fullmatch(text) else text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
