"""Text pairs and triplets: JSON lines in the usual forms, tables and parquet files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.names import is_hidden
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.dialects import DELIMITER, ENCODING, ESCAPE, NO_HEADER, QUOTING, Said
from data_prep.sources.json_lists import list_pieces, read_list
from data_prep.sources.labels import COLUMN, GRADED, LEAST, NO_MATCH, POSITIVES, SCALE, Judgement, Labels
from data_prep.sources.no_match import hard_negatives, left_for_later
from data_prep.sources.packed import ENDINGS, PACKED, is_packed, unpacked_name
from data_prep.sources.parquet import parquet_columns, parquet_pieces, read_parquet
from data_prep.sources.records import (
    Dropped,
    Found,
    NoMatch,
    Noted,
    Row,
    TextRecord,
    argument,
    file_stat,
    option,
    pick,
    showing,
    usual_column,
)
from data_prep.sources.tables import (
    check_columns,
    line_pieces,
    noted,
    open_bytes,
    open_table,
    read_lines,
    read_table,
    unknown,
)
from data_prep.sources.unnamed_labels import check_lists, check_others

NO_FORM = "not one of the forms of pairs and triplets"
_ROWS = 20_000
_LOOK_AT = 1000  # rows of a file
_TABLES = (".csv", ".tsv")
_ALSO_TABLES = (*_TABLES, ".txt", ".tab")  # where they are named one by one
_ENDINGS = (*(name + end for name in (".jsonl", ".ndjson", *_TABLES) for end in ("", *ENDINGS)), ".parquet")
_QUERY = ("query", "anchor", "question", "sentence1", "text1", "question1", "premise", "source")
_POSITIVE = ("pos", "positive")
_TARGET = (
    *_POSITIVE, "target", "answer", "document", "passage", "sentence2", "text2", "question2", "hypothesis"
)  # fmt: skip
_PARTNERS = {
    "sentence1": "sentence2",
    "text1": "text2",
    "question1": "question2",
    "premise": "hypothesis",
}
_NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?(_\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Texts:
    """text pairs and triplets: JSON lines, CSV, TSV (also packed) or parquet

    A JSON line is [query, target], [query, target, negative, …], {"set": [texts that say the same]}, or an object with
    the columns of a table: query, target, and the negatives in one list or in a column each, found by their usual names
    or named by options. With enough negatives a line becomes a triplet; with fewer a pair, which the
    receipt counts. A column that is called label, score, similarity and the like says whether the texts match, or how
    much: only those that do are positives, and those labelled as no match are hard negatives of the matches of their
    query.
    """

    image: ClassVar[ImageRule | None] = None

    files: tuple[str, ...] = argument("files, or folders of files")
    language: str = option("und", "language of the texts, ISO 639-1; QUERY,TARGET for pairs across languages")
    origin: str = option("human", "where the texts came from: human, machine-translation, synthetic:MODEL")
    negatives: int = option(7, "negatives of a triplet; what has more is cut")
    query_column: str = option("", f"column of the query (default: the first of {', '.join(_QUERY)})")
    target_column: str = option("", f"column of the target (default: the first of {', '.join(_TARGET)})")
    negative_columns: str = option("", "columns of negatives, with commas (default: negative, neg, negative_1, …)")
    label_column: str = option("", COLUMN)
    positives: str = option("", POSITIVES)
    no_match: str = option("", NO_MATCH)
    score_scale: float = option(1.0, SCALE)
    min_score: float = option(0.8, LEAST)
    graded: str = option("pairs", GRADED, choices=("pairs", "sts"))
    delimiter: str = option("", DELIMITER)
    quoting: str = option("", QUOTING, choices=("double", "none"))
    escape: str = option("", ESCAPE)
    encoding: str = option("", ENCODING)
    no_header: bool = option(False, NO_HEADER)

    def pieces(self) -> Iterator[JsonObject]:
        languages = self.language.split(",")
        if len(languages) > 2 or not all(languages):
            raise UserError(f"--language {self.language}: expected one language, or QUERY,TARGET (de,en)")
        if self.negatives < 1:
            raise UserError(f"--negatives {self.negatives}: expected at least 1")
        self._labels()  # refuses what cannot be a scale
        file, labelled, again = "", False, list[JsonObject]()
        for piece in self._pieces():
            if piece["file"] != file:  # labels that cannot be read are refused before it begins
                labelled = self.labelled(_rows(_all_columns(piece)))
            file = piece["file"]
            again += [piece] * labelled
            yield {**piece, "gathered": labelled}
        if again:
            yield {"file": again[0]["file"], "no_match": again}

    def _pieces(self) -> Iterator[JsonObject]:
        said = Said(self.delimiter, self.quoting, self.escape, self.encoding, not self.no_header)
        paths = files_in(self.files, _ENDINGS)
        for path, name in zip(paths, names_of(paths), strict=True):
            if str(path) not in self.files and not path.stat().st_size:
                yield {"file": str(path), **file_stat(path), "format": "empty", "shown": name}
            elif path.suffix.lower() == ".parquet":
                columns = self._needed(path, parquet_columns(path))
                for piece in parquet_pieces([path], _ROWS, columns=columns):
                    yield {**piece, "format": "parquet", "columns": columns, "shown": name}
            elif unpacked_name(path.name).endswith(_ALSO_TABLES):
                table = open_table(path, said)
                self._needed(path, table.columns)
                for piece in table.pieces(_ROWS):
                    yield {**piece, "shown": name}
            elif _is_list(path):
                yield from ({**piece, "format": "list"} for piece in list_pieces(path, _ROWS))
            else:
                for piece in line_pieces(path):
                    yield {**piece, "shown": name}

    def read(self, piece: JsonObject) -> Iterator[Found]:
        if "no_match" in piece:
            rows = ((one["file"], found) for one in piece["no_match"] for found in self._found(one))
            yield from hard_negatives(rows, self.negatives)
        else:
            yield from noted(piece)
            yield from left_for_later(self._found(piece), gathered=piece["gathered"])

    def _found(self, piece: JsonObject) -> Iterator[Found | NoMatch]:
        for row in _rows(piece):
            if isinstance(row, Dropped):
                yield row
            else:
                yield from showing(row[1], self.record(*row))

    def labelled(self, rows: Iterable[Row | Dropped]) -> bool:
        """Whether the first rows have labels of which those that are no match become hard negatives. UserError if they
        have labels or scores that cannot be read."""
        found = [row for row in islice(rows, _LOOK_AT) if not isinstance(row, Dropped)]
        first = [row for row in found if isinstance(row[1], dict)]
        said = [self._judged(*row) for row in first]
        check_lists(self._labels(), found)
        if first and self._positive(first[0][1]):
            self._labels().check_classes(first)
        if first and not self._positive(first[0][1]):
            check_others(self._labels(self._pair(first[0][1])), first)
        wanted = self.graded == "pairs" and self.no_match != "none"
        return wanted and any(one is not None and one.grade is None for one in said)

    def record(self, where: str, value: Any) -> Iterator[Found | NoMatch]:
        """What a line or row gives."""
        first, _, second = self.language.partition(",")
        parts = self._parts(value)
        if parts is None:
            yield Dropped(NO_FORM, where)
            return
        query, target, negatives = ([text for text in part if text.strip()] for part in parts)
        if not query or not target:
            yield Dropped("empty text", where)
            return
        said = self._judged(where, value) if isinstance(value, dict) else None
        score = said.grade if said and self.graded == "sts" else None
        if self.graded == "sts" and score is None:
            yield Dropped("pair without a score", where)
            return
        if said and not said.right and score is None:
            if said.against and self.no_match != "none":
                yield NoMatch(where, self._texts(query, first), self._texts(target, second or first))
            else:
                yield Dropped(said.reason, where)
            return
        enough = len(negatives) >= self.negatives
        if negatives and not enough:
            yield Noted(f"with fewer than {self.negatives} negatives, as pairs")
        yield TextRecord(
            where,
            self._texts(query, first),
            self._texts(target, second or first),
            [self._texts([text], second or first) for text in negatives[: self.negatives]] if enough else None,
            score,
        )

    def _judged(self, where: str, values: JsonObject) -> Judgement | None:
        """What labels and scores of a row say of its pair. A column that is called positive says it itself: a score
        beside it is a teacher's, and only a label of a row without negatives can say no."""
        labels = self._labels(self._pair(values))
        if not self._positive(values):
            return labels.judge(values, where)
        against = not self._negatives(values) and labels.contradicts(values)
        return Judgement(False, "labelled as no match", against=True) if against else None

    def _positive(self, values: JsonObject) -> bool:
        return not self.label_column and self._pair(values)[1].lower() in _POSITIVE

    def _pair(self, columns: Collection[str]) -> tuple[str, str]:
        """The columns of query and target that are named, or there by their usual names; "" for none.

        sentence1 has sentence2 for its target, whatever else there is: "target" is a label then, 0 or 1.
        """
        query = self.query_column or usual_column(columns, self._usual(_QUERY))
        beside = [_PARTNERS[query.lower()]] if query.lower() in _PARTNERS else []
        return query, self.target_column or usual_column(columns, (*beside, *self._usual(_TARGET)))

    def _labels(self, texts: tuple[str, ...] = ()) -> Labels:
        positives, no_match = (tuple(said.split(",")) if said else () for said in (self.positives, self.no_match))
        return Labels(
            self.label_column,
            positives,
            no_match,
            self.score_scale,
            self.min_score,
            graded=self.graded == "sts",
            texts=(*texts, self.query_column, self.target_column, *self.negative_columns.split(",")),
        )

    def _parts(self, value: Any) -> tuple[list[str], list[str], list[str]] | None:
        """Query, targets and negatives of a line; None if it has another form."""
        if isinstance(value, list) and len(value) >= 2:
            parts = value[:1], value[1:2], value[2:]
        elif isinstance(value, dict) and isinstance(value.get("set"), list):
            parts = value["set"][:1], value["set"][1:], []
        elif isinstance(value, dict):
            negatives = [text for name in self._negatives(value) for text in _listed(pick(value, name, ()))]
            query, target = (pick(value, name, ()) for name in self._pair(value))
            if query is None or target is None:
                return None
            parts = [query], _listed(target), negatives
        else:
            return None
        return parts if all(isinstance(text, str) for part in parts for text in part) else None

    def _negatives(self, columns: Iterable[str]) -> list[str]:
        """The columns that hold negatives."""
        if self.negative_columns:
            return self.negative_columns.split(",")
        return [name for name in columns if _NEGATIVE.fullmatch(name)]

    def _needed(self, path: Path, columns: Sequence[str]) -> list[str]:
        """Those of a file's columns that are read. UserError if some are missing."""
        if self.no_header and len(columns) != 2 and not (self.query_column and self.target_column):
            raise UserError(
                f"{path}: has {len(columns)} columns without names; say which: --query-column 1 --target-column 2"
            )
        needed = [*self._negatives(columns), *self._labels(self._pair(columns)).columns(columns)]
        for what, found in zip(("query", "target"), self._pair(columns), strict=True):
            if not found:
                raise UserError(
                    f"{path}: {unknown(columns)} for the {what}; name it: --{what}-column; if they are the first row, "
                    "say --no-header"
                )
            needed.append(found)
        check_columns(path, columns, needed)
        return list(dict.fromkeys(needed))

    def _usual(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The usual names of query or target; without a header their places."""
        return ("1" if names is _QUERY else "2",) if self.no_header else names

    def _texts(self, texts: list[str], language: str) -> list[Text]:
        return [Text(text, language, "body", self.origin) for text in texts]


def files_in(paths: tuple[str, ...], endings: tuple[str, ...]) -> list[Path]:
    """The given files, and files with these endings in the given folders, sorted. UserError if there are none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.name.lower().endswith(endings) and file.is_file() and not is_hidden(str(file.relative_to(path)))
            )
            if not inside:
                plain = dict.fromkeys(ending for ending in endings if not ending.endswith(ENDINGS))
                raise UserError(f"{path}: holds no {' or '.join(plain)} file")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return found


def names_of(paths: Sequence[Path]) -> list[str]:
    """How files are called in a receipt: by their last name, and those that share it by as much more as parts them."""
    found = [path.name for path in paths]
    for count in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        often = Counter(found)
        if len(often) == len(found):
            break
        found = [
            "/".join(path.parts[-count:]) if often[name] > 1 else name for path, name in zip(paths, found, strict=True)
        ]
    return found


def _rows(piece: JsonObject) -> Iterator[Row | Dropped]:
    if piece.get("format") == "parquet":
        return read_parquet(piece, piece["columns"], texts=piece["columns"])
    if piece.get("format") == "list":
        return read_list(piece)
    if piece.get("format") == "empty":  # Spark writes one for each part without rows
        return iter([Dropped("file without rows", piece["shown"])])
    return read_table(piece) if piece.get("format") == "table" else read_lines(piece)


def _all_columns(piece: JsonObject) -> JsonObject:
    """The piece with all columns of its file, those that are not needed as well."""
    if piece.get("format") != "parquet":
        return piece
    return {**piece, "columns": [name for name in parquet_columns(Path(piece["file"])) if "." not in name]}


def _is_list(path: Path) -> bool:
    """Whether a file is one JSON list of objects or lists; a line of JSON lines does not begin so. UserError if it is
    packed: a list is read from several places."""
    with open_bytes(path) as file, suppress(*PACKED):
        found = re.match(rb"(\xef\xbb\xbf)?\s*\[\s*[\[{]", file.read(4096)) is not None
        if found and is_packed(path):
            raise UserError(f"{path}: a JSON list that is packed; unpack it, or write lines (`jq -c '.[]'`)")
        return found
    return False


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
