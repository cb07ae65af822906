"""What importers yield: images with captions, related texts, and what they left out and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from data_prep.image_rule import ImageRule
from data_prep.samples import Text
from data_prep.shards.format import JsonObject


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image with captions. `item` is its identity: equal ones are never each other's negatives.

    image: the file's bytes, or its path. short, long: captions; each list that is not empty gives a sample of its kind.
    negatives: images that the captions do not describe, the hardest first; with `triplet` of them that can be stored
        the record is a triplet, whose captions are those of both lists. left_out: whether there were others, which
        cannot be used.
    where: for the receipt, in case the image is broken.
    """

    where: str
    item: str
    image: bytes | Path
    short: Sequence[Text] = ()
    long: Sequence[Text] = ()
    negatives: Sequence[bytes | Path] = ()
    triplet: int = 0
    left_out: bool = False


@dataclass(frozen=True, slots=True)
class TextRecord:
    """Alternatives of a query and of its target; with `negatives` (alternatives of each) a triplet; one item each.

    score: how alike people find the two, of a pair that is for evaluation. scores: a teacher's, of a triplet's query
    with its target and with each negative. rows: of the input that it stands for.
    """

    where: str
    query: Sequence[Text]
    target: Sequence[Text]
    negatives: Sequence[Sequence[Text]] | None = None
    score: float | None = None
    scores: Sequence[float] | None = None
    rows: int = 1


@dataclass(frozen=True, slots=True)
class NoMatch:
    """A query and a target that are labelled as no match: perhaps a hard negative, never a pair."""

    where: str
    query: Sequence[Text]
    target: Sequence[Text]


@dataclass(frozen=True, slots=True)
class Dropped:
    """`count` records left out, for one of a few fixed reasons; `where` names the first.

    content: what stood there, as far as it is known; the list of what was dropped shows the beginning of its texts.
    source: the file, where it is not that of the piece.
    """

    reason: str
    where: str
    count: int = 1
    content: Any = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Noted:
    """A further count for the receipt."""

    name: str
    count: int = 1


Found = ImageRecord | TextRecord | Dropped | Noted
_One = TypeVar("_One")
Row = tuple[str, Any]  # place ("captions.csv, line 17") and content


def from_rows(rows: Iterable[Row | Dropped], record: Callable[[str, JsonObject], Iterator[Found]]) -> Iterator[Found]:
    """The records that `record` makes of each row (place, fields); rows that are no JSON objects are dropped."""
    for row in objects(rows):
        if isinstance(row, Dropped):
            yield row
        else:
            yield from showing(row[1], record(*row))


def showing(content: Any, found: Iterable[_One]) -> Iterator[_One]:
    """What was found in a row; where it is dropped, with the row's content."""
    for one in found:
        yield replace(one, content=content) if isinstance(one, Dropped) and one.content is None else one


def objects(rows: Iterable[Row | Dropped]) -> Iterator[tuple[str, JsonObject] | Dropped]:
    """Rows that are JSON objects; others become `Dropped`."""
    for row in rows:
        if isinstance(row, Dropped) or isinstance(row[1], dict):
            yield row
        else:
            yield Dropped("not a JSON object", *row[:1], content=row[1])


def pick(values: JsonObject, named: str, usual: Sequence[str]) -> Any:
    """The value of the column that the user named, else of the first usual one; None if there is none.

    `translation.en` is that column or, without one, the field of an object.
    """
    named = named or usual_column(values, usual)
    name, _, rest = named.partition(".")
    if named in values or not rest:
        return values.get(named)
    return pick(inner, rest, ()) if isinstance(inner := values.get(name), dict) else None


def usual_column(columns: Collection[str], usual: Sequence[str]) -> str:
    """The first of the usual columns that is there, "" if none is; in capitals if there is none in small letters."""
    if found := next((name for name in usual if name in columns), ""):
        return found
    small = {name.lower(): name for name in columns}
    return next((small[name] for name in usual if name in small), "")


def file_stat(path: Path) -> JsonObject:
    """Size and modification time (ns), which reveal an edited file without reading it. OSError if it is gone."""
    status = path.stat()
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


class Source(Protocol):
    """An importer: a frozen dataclass of plain values (they go into the receipt), made from the command line.

    Of its docstring the first line is what `data-prep import --help` lists, all of it what the importer's own shows.
    """

    image: ClassVar[ImageRule | None]  # the default for images; None if the source has none

    def pieces(self) -> Iterator[JsonObject]:
        """Cut the input into units of work, each some seconds of it. UserError if it is missing or of another format.

        Pieces are plain JSON values. Each has the `file_stat` of its files, or an import that goes on would not notice
        that they were edited; those of `tables`, `parquet` and `json_lists` have it.
        """
        ...

    def read(self, piece: JsonObject) -> Iterator[Found]:
        """Yield all records of a piece, by nothing but piece and fields: it may run in another process, or again.

        What cannot be used is `Dropped`, a file that is not UTF-8 for example. UserError only if it makes no sense to
        continue.
        """
        ...


def argument(explanation: str) -> Any:
    """A field of a source that is a positional argument of the command."""
    return field(metadata={"help": explanation})


def option(default: Any, explanation: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A field of a source that is an option --name of the command."""
    return field(default=default, metadata={"help": explanation, "choices": choices})
