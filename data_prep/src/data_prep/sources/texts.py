"""Text pairs and triplets as JSON lines, in every form that public collections use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import UserError
from ..image_rule import ImageRule
from ..samples import Text
from .records import Dropped, Found, Noted, TextRecord, argument, option
from .tables import line_pieces, read_lines


@dataclass(frozen=True)
class Texts:
    """text pairs and triplets: .jsonl or .jsonl.gz

    A line is [query, target], [query, target, negative, …], {"set": [texts that say the same]},
    {"query": …, "pos": […]} or {"query": …, "pos": […], "neg": […]}. With enough negatives a line becomes a triplet;
    with fewer it becomes a pair, and the receipt says how many did.
    """

    image: ClassVar[ImageRule | None] = None

    files: tuple[str, ...] = argument("files, or folders of files")
    language: str = option("und", "language of the texts, ISO 639-1; QUERY,TARGET for pairs across languages")
    origin: str = option("human", "where the texts came from: human, machine-translation, synthetic:MODEL")
    negatives: int = option(7, "negatives of a triplet; what has more is cut")

    def pieces(self) -> Iterator[dict[str, Any]]:
        """Some megabytes of lines; a packed file is one piece."""
        languages = self.language.split(",")
        if len(languages) > 2 or not all(languages):
            raise UserError(f"--language {self.language}: expected one language, or QUERY,TARGET (de,en)")
        for path in files_in(self.files, (".jsonl", ".jsonl.gz", ".ndjson")):
            yield from line_pieces(path)

    def read(self, piece: dict[str, Any]) -> Iterator[Found]:
        """A record a line."""
        first, _, second = self.language.partition(",")
        for row in read_lines(piece):
            if isinstance(row, Dropped):
                yield row
                continue
            where, value = row
            parts = _parts(value)
            if parts is None:
                yield Dropped("not one of the forms of pairs and triplets", where)
                continue
            query, target, negatives = ([text for text in part if text.strip()] for part in parts)
            if not query or not target:
                yield Dropped("empty text", where)
                continue
            enough = len(negatives) >= self.negatives
            if negatives and not enough:
                yield Noted(f"with fewer than {self.negatives} negatives, as pairs")
            yield TextRecord(
                where,
                self._texts(query, first),
                self._texts(target, second or first),
                [self._texts([text], second or first) for text in negatives[: self.negatives]] if enough else None,
            )

    def _texts(self, texts: list[str], language: str) -> list[Text]:
        return [Text(text, language, "body", self.origin) for text in texts]


def files_in(paths: tuple[str, ...], endings: tuple[str, ...]) -> list[Path]:
    """The files named, and those of such names in the folders named, sorted. UserError if there are none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(endings) and file.is_file())
            if not inside:
                raise UserError(f"{path}: holds no {' or '.join(endings)} file")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return found


def _parts(value: Any) -> tuple[list[str], list[str], list[str]] | None:
    """Query, targets and negatives of a line; None if it has none of the forms."""
    if isinstance(value, list) and len(value) >= 2:
        parts = value[:1], value[1:2], value[2:]
    elif isinstance(value, dict) and isinstance(value.get("set"), list):
        parts = value["set"][:1], value["set"][1:], []
    elif isinstance(value, dict) and "query" in value and "pos" in value:
        parts = [value["query"]], _listed(value["pos"]), _listed(value.get("neg") or [])
    else:
        return None
    return parts if all(isinstance(text, str) for part in parts for text in part) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
