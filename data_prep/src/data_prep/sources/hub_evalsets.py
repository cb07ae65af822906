"""Evaluation sets as the Hugging Face hub serves them: mteb's Crossmodal-3600, ViDoRe's first version as published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.ids import same_id
from data_prep.sources.parquet import image_bytes, parquet_pieces, read_parquet
from data_prep.sources.records import Dropped, Found, ImageRecord, argument, file_stat, objects, option
from data_prep.sources.texts import files_in, names_of

_ROWS = 500
_FIRST = "en"  # whose files the images are taken from


@dataclass(frozen=True)
class Xm3600Parquet:
    """Crossmodal-3600 as mteb serves it: a parquet file or more for each language

    mteb/xm3600. Each language has all images; they are read from the English ones, or else the first. The first caption
    of each language is evaluated, as in the form of its authors.
    """

    image: ClassVar[ImageRule | None] = ImageRule(512, kernel="bicubic")

    files: tuple[str, ...] = argument("parquet files named LANGUAGE-….parquet, or folders of them")

    def pieces(self) -> Iterator[JsonObject]:
        by_language = _by_language(self.files)
        language = _FIRST if _FIRST in by_language else min(by_language)
        captions, lost = _captions(self.files)
        there = {same_id(row["image_id"]) for row in _rows(by_language[language], ("image_id",))}
        lost = [*lost, *(f"captions of image {image}" for image in captions if image not in there)]
        stamps = [file_stat(path) for paths in by_language.values() for path in paths]
        for piece in parquet_pieces(by_language[language], _ROWS, columns=("image_id", "image", "captions")):
            yield {**piece, "stamps": stamps, "lost": lost}
            lost = []

    def read(self, piece: JsonObject) -> Iterator[Found]:
        for where in piece["lost"]:
            yield Dropped("captions whose image is not there, or that cannot be read", where)
        for row in objects(read_parquet(piece, ("image_id", "image"), texts=("image_id",))):
            if isinstance(row, Dropped):
                yield row
                continue
            where, fields = row
            name, image = same_id(fields.get("image_id")), image_bytes(fields.get("image"))
            captions = _captions(self.files)[0].get(name or "")
            if name is None or image is None:
                yield Dropped("no image" if image is None else "no image_id", where)
            elif not captions:
                yield Dropped("no caption", where)
            else:
                yield ImageRecord(where, f"{name}.jpg", image, captions)


def _by_language(files: tuple[str, ...]) -> dict[str, list[Path]]:
    """The files of each language, which their names begin with."""
    found: dict[str, list[Path]] = {}
    for path in files_in(files, (".parquet",)):
        language, dash, _ = path.stem.partition("-")
        if not dash or not language.isalpha():
            raise UserError(f"{path}: expected LANGUAGE-….parquet, as mteb/xm3600 names its files")
        found.setdefault(language, []).append(path)
    return found


@cache
def _captions(files: tuple[str, ...]) -> tuple[dict[str, list[Text]], list[str]]:
    """Image → its captions, languages by name; and the rows that have none that can be read."""
    found: dict[str, list[Text]] = {}
    lost: list[str] = []
    for language, paths in sorted(_by_language(files).items()):
        for row in _rows(paths, ("image_id", "captions")):
            name, captions = same_id(row["image_id"]), row["captions"]
            if name is None or not isinstance(captions, list) or not all(isinstance(one, str) for one in captions):
                lost.append(f"{language}, image {row['image_id']!r:.80}")
                continue
            own = found.setdefault(name, [])
            if any(text.language == language for text in own):
                raise UserError(f"{paths[0]}: the image {name!r} comes twice in {language}; name each file once")
            texts = filter(None, map(str.strip, captions))
            own += [Text(text, language, "further" if number else "name") for number, text in enumerate(texts)]
    return found, lost


@dataclass(frozen=True)
class VidoreRows:
    """ViDoRe's first version as published: a row for each question, with its page

    vidore/arxivqa_test_subsampled and its nine siblings. Pages are told apart by their file's name and come once, in
    the order of the rows; one without a question stays as a candidate.
    """

    image: ClassVar[ImageRule | None] = ImageRule(1024, kernel="bicubic")

    files: tuple[str, ...] = argument("parquet files of the test split, or folders of them")
    language: str = option("en", "language of the questions (TabFQuAD and Shift Project have French ones)")

    def pieces(self) -> Iterator[JsonObject]:
        _pages(self.files, self.language)  # what is wrong with all of it is said before anything is written
        paths = files_in(self.files, (".parquet",))
        for path, name in zip(paths, names_of(paths), strict=True):
            for piece in parquet_pieces([path], _ROWS, columns=("query", "image", "image_filename")):
                yield {**piece, "shown": name}

    def read(self, piece: JsonObject) -> Iterator[Found]:
        pages = _pages(self.files, self.language)
        for row in objects(read_parquet(piece, ("image", "image_filename"), texts=("image_filename",))):
            if isinstance(row, Dropped):
                yield row
                continue
            where, fields = row
            name, image = same_id(fields.get("image_filename")), image_bytes(fields.get("image"))
            if name is None or image is None:
                yield Dropped("no image" if image is None else "no image_filename", where)
            elif pages[name][0] == where:
                yield ImageRecord(where, name, image, short=pages[name][1] or [Text(name, "und", "key")])


@cache
def _pages(files: tuple[str, ...], language: str) -> dict[str, tuple[str, list[Text]]]:
    """Page → (its first row, the questions that it answers, each once)."""
    found: dict[str, tuple[str, list[Text]]] = {}
    paths = files_in(files, (".parquet",))
    for path, name in zip(paths, names_of(paths), strict=True):
        for piece in parquet_pieces([path], 10**9, columns=("query", "image_filename")):
            rows = read_parquet(
                {**piece, "shown": name}, ("query", "image_filename"), texts=("query", "image_filename")
            )
            for row in rows:
                if isinstance(row, Dropped):
                    raise UserError(f"{row.where}: {row.reason}; without it the benchmark would not be whole")
                where, fields = row
                page, query = same_id(fields.get("image_filename")), fields.get("query")
                if page is None:
                    continue
                questions = found.setdefault(page, (where, []))[1]
                if isinstance(query, str) and query.strip() not in {"", *(text.text for text in questions)}:
                    questions.append(Text(query.strip(), language, "query", score=1))
    if not any(questions for _, questions in found.values()):
        raise UserError(f"{', '.join(files)}: no row has a question and its page (query, image, image_filename)")
    return found


def _rows(paths: Sequence[Path], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for piece in parquet_pieces(paths, 10**9, columns=columns):
        for row in read_parquet(piece, columns, texts=columns):
            if isinstance(row, Dropped):
                raise UserError(f"{row.where}: {row.reason}; without it the set would not be whole")
            yield row[1]
