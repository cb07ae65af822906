"""What a command line names, one text or image after the other: image files and folders, text files, tables, shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from data_prep.shards import MANIFEST, Dataset, ShardError, content_of, texts_in

from stage_trainer.bulk.tables import TABLES, Cell, Columns, open_table, shown
from stage_trainer.encoding import IMAGE_SUFFIXES as IMAGES
from stage_trainer.errors import UserError
from stage_trainer.recipe.address import without_credentials

LINES = (".txt", ".txt.gz")
KINDS = ("text", "image")
READS = (
    f"image files ({', '.join(IMAGES)}), folders of them, text files ({', '.join(LINES)}: one a line), tables "
    f"({', '.join(TABLES)}: --column), and data sets in our shards"
)


class Sample(NamedTuple):
    """The image of a data set's sample, which is read where it is encoded."""

    directory: str
    number: int


@dataclass(frozen=True)
class Entry:
    """A text or an image to encode, or something that is neither.

    Attributes:
        id: stands beside the vector.
        kind: one of `KINDS`.
        value: a text; of an image its path, URL, data URI, bytes or `Sample`. None if there is none.
        fault: why it cannot be encoded; empty if nothing is known.
        stamp: changes with what the value stands for: a file's size and time, a data set's fingerprint.
    """

    id: str
    kind: str
    value: str | bytes | Sample | None
    fault: str = ""
    stamp: str = ""


class Input(Protocol):
    """One of the files and folders that are named."""

    def count(self) -> int | None:
        """How many entries it has; None if only reading all of it would tell."""

    def __iter__(self) -> Iterator[Entry]: ...


def open_inputs(paths: Sequence[Path], kind: str | None, columns: Columns) -> list[Input]:
    """The inputs in order, each looked at but not read.

    Args:
        kind: of lines, cells and samples, one of `KINDS`; None for texts, but images of data sets of images and of
            columns of bytes.

    Raises:
        UserError: one is missing, or of no kind that is known; a table without the column; columns and no table.
    """
    found = []
    for path in paths:
        try:
            found.append(_open(path, kind, columns))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    if columns.named and not any(path.name.lower().endswith(TABLES) for path in paths):
        raise UserError(f"{columns.named} is for tables ({', '.join(TABLES)}), and there is none among the inputs")
    return found


def _open(path: Path, kind: str | None, columns: Columns) -> Input:
    name = path.name.lower()
    if not path.exists():
        raise UserError(f"there is no {path}; expected {READS}")
    if (path / MANIFEST).exists():
        return _data_set(path, kind)
    if path.is_dir() or name.endswith(IMAGES):
        if kind == "text":
            raise UserError(f"{path} is of images, and --kind says text; leave that out, or name the texts alone")
        return Images(path)
    if not path.is_file():
        raise UserError(f"{path} is no ordinary file; expected {READS}")
    if name.endswith(LINES):
        return Cells(path, kind, columns)
    if name.endswith(TABLES):
        if columns.value is None:
            columns_there = ", ".join(open_table(path, columns).names())
            raise UserError(f"{path} is a table: say which column with --column; it has {columns_there}")
        return Cells(path, kind, columns)
    raise UserError(f"{path} ends in nothing that is known here; expected {READS}")


class Images:
    """An image file, or every image file below a folder, by path."""

    def __init__(self, path: Path):
        self.paths = [str(path)] if path.is_file() else sorted(_below(path))
        if not self.paths:
            raise UserError(
                f"{path} holds no images ({', '.join(IMAGES)}) and no {MANIFEST}; of a corpus name data sets, such as "
                f"{path / 'train' / 'image-short' / 'NAME'}"
            )

    def count(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Entry]:
        for path in self.paths:
            yield image(shown(path), path)


def _below(folder: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:  # or a folder that may not be read would be an empty one
        raise error

    for place, _, names in os.walk(folder, onerror=fail):
        yield from (os.path.join(place, name) for name in names if name.lower().endswith(IMAGES))


class Cells:
    """The lines of a text file, or a column of a table."""

    def __init__(self, path: Path, kind: str | None, columns: Columns):
        self.path, self.kind = path, kind
        self.table = open_table(path, columns)

    def count(self) -> int:
        return self.table.count()

    def __iter__(self) -> Iterator[Entry]:
        for cell in self.table:
            yield self._entry(cell)

    def _entry(self, cell: Cell) -> Entry:
        value, kind = cell.value, self.kind or ("image" if isinstance(cell.value, bytes) else "text")
        if cell.fault:
            return Entry(cell.id, kind, None, cell.fault)
        if kind == "text":
            if not isinstance(value, str):
                return Entry(cell.id, kind, None, f"it is {_what(value)}, no text")
            return Entry(cell.id, kind, value) if value.strip() else Entry(cell.id, kind, None, "the text is empty")
        if isinstance(value, bytes):
            return Entry(cell.id, kind, value)
        if not isinstance(value, str) or not value.strip():
            return Entry(cell.id, kind, None, f"it is {_what(value)}, no image's path, URL or bytes")
        if value[:8].lower().startswith(("http://", "https://", "data:")):
            return Entry(cell.id, kind, value)
        return image(cell.id, str(self.path.parent / value))


def image(name: str, path: str) -> Entry:
    """An image in a file, which is looked at but not read."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        missing = isinstance(error, FileNotFoundError)
        fault = "there is no such file" if missing else f"it cannot be read ({getattr(error, 'strerror', error)})"
        return Entry(name, "image", None, f"{shown(path)}: {fault}")
    return Entry(name, "image", path, stamp=f"{found.st_size} {found.st_mtime_ns}")


def name_of(entry: Entry) -> str:
    """What an entry is called in messages and in the list of those that were left out."""
    if entry.kind == "image" and isinstance(entry.value, str) and entry.value[:5].lower() != "data:":
        value = without_credentials(entry.value)
        return entry.id if value == entry.id else f"{entry.id} ({shown(value)})"
    return entry.id


def _what(value: object) -> str:
    return "empty" if value is None or value == "" else f"of type {type(value).__name__}"


def _data_set(path: Path, kind: str | None) -> Input:
    try:
        data = Dataset.open(path)
    except (ShardError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    if (kind or ("image" if data.kind.startswith("image") else "text")) == "text":
        return TextsOfSamples(data)
    if not data.kind.startswith("image"):
        raise UserError(f"{path} holds {data.kind}, and --kind says image; it has none")
    return ImagesOfSamples(data)


class ImagesOfSamples:
    """The images of a data set; their ids are the samples' keys."""

    def __init__(self, data: Dataset):
        self.data = data

    def count(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Entry]:
        directory = str(self.data.directory)
        for number in range(len(self.data)):
            _, key = self.data.name(number)
            yield Entry(key, "image", Sample(directory, number), stamp=self.data.fingerprint)


class TextsOfSamples:
    """The texts of a data set: KEY/captions/0, KEY/query/0, …"""

    def __init__(self, data: Dataset):
        self.data = data

    def count(self) -> None:
        return None

    def __iter__(self) -> Iterator[Entry]:
        for number in range(len(self.data)):
            _, key = self.data.name(number)
            try:
                parts = list(texts_in(self.data.kind, content_of(self.data.kind, self.data.read(number))))
            except ShardError as error:
                yield Entry(key, "text", None, str(error))
                continue
            counts: dict[str, int] = {}
            for part, texts in parts:
                for text in texts:
                    place = counts[part] = counts.get(part, -1) + 1
                    yield Entry(f"{key}/{part}/{place}", "text", text["text"])
