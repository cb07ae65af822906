"""Evaluation sets of texts: BEIR's and MTEB's retrieval sets whole, and pairs with people's scores.

What MTEB's repositories hold as parquet, JSON lines or TSV is written in BEIR's own form, which other evaluators read:
corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; pairs as test.jsonl. set.json has counts and the hash of each file. Unlike
an import it leaves nothing out: a benchmark without some rows is another one, so a row that cannot be read is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from data_prep.errors import UserError
from data_prep.names import check_name
from data_prep.shards import alone, sync, write_file
from data_prep.shards.files import writing
from data_prep.shards.format import JsonObject
from data_prep.sources.arrow import read_arrow
from data_prep.sources.beir_files import ID, QRELS, Part, find_part
from data_prep.sources.hf_files import find_files
from data_prep.sources.ids import same_id
from data_prep.sources.parquet import read_parquet
from data_prep.sources.records import Dropped, Row, argument, objects, option
from data_prep.sources.tables import read_lines

SCHEMA = "trilith-evalset/1"
FOLDER = "text"  # of the sets, beside image-short
_TEXT = ("text", "query", "passage", "contents", "body")
_PAIR = ("sentence1", "sentence2", "score")


class TextSet(Protocol):
    """A set of texts, made from the command line."""

    kind: ClassVar[str]

    def write(self, folder: Path) -> dict[str, int]:
        """Writes its files into an empty folder; returns its counts. UserError if it is not whole."""
        ...


@dataclass(frozen=True)
class BeirSet:
    """a retrieval set of MTEB or BEIR: the whole corpus, the queries of a split and their judgements

    Of the queries those with judgements stay. `--name` is the task's in MTEB (SciFact, CQADupstackAndroidRetrieval),
    by which `stage-trainer evaluate --suite text` finds it.
    """

    kind: ClassVar[str] = "retrieval"

    data: str = argument("folder with corpus, queries and qrels, or OWNER/NAME on the hub (mteb/scifact)")
    split: str = option("test", "split of the judgements; of MSMARCO published figures are on dev")
    config: str = option("", "subset, where parts are called CONFIG-corpus, CONFIG-queries, CONFIG-qrels")

    def write(self, folder: Path) -> dict[str, int]:
        corpus, queries, qrels = (
            find_part(self.data, part, self.config, self.split) for part in ("corpus", "queries", "qrels")
        )
        grades = self._judgements(qrels)
        documents = _write_lines(folder / "corpus.jsonl", self._documents(corpus))
        asked = _write_lines(folder / "queries.jsonl", self._queries(queries, {query for query, _ in grades}))
        if not documents or not asked:
            raise UserError(
                f"{self.data}: {len(documents):,} documents and {len(asked):,} queries with judgements of the split "
                f"{self.split!r}; are corpus, queries and qrels of one set?"
            )
        (folder / "qrels").mkdir()
        lines = "".join(f"{query}\t{document}\t{grade:g}\n" for (query, document), grade in grades.items())
        write_file(folder / "qrels" / f"{self.split}.tsv", f"query-id\tcorpus-id\tscore\n{lines}".encode())
        lost = sum(query not in asked or document not in documents for query, document in grades)
        counts = {"queries": len(asked), "documents": len(documents), "judgements": len(grades)}
        # Some published sets have such judgements; evaluators count them as relevant ones that cannot be found.
        return counts | ({"judgements of a query or document that is not there": lost} if lost else {})

    def _judgements(self, part: Part) -> dict[tuple[str, str], float]:
        """The last judgement of a pair counts, as in BEIR."""
        grades: dict[tuple[str, str], float] = {}
        for where, row in _whole(part.rows(QRELS)):
            query, document, score = (same_id(row.get(name)) for name in QRELS)
            try:
                grade = float(score or "")
            except ValueError:
                grade = math.nan
            if query is None or document is None or not math.isfinite(grade) or {"\t", "\n"} & {*query, *document}:
                raise UserError(f"{where}: expected query-id, corpus-id and a number as score, found {row!s:.120}")
            grades[query, document] = grade
        return grades

    def _documents(self, part: Part) -> Iterator[tuple[str, JsonObject]]:
        for where, row in _whole(part.rows((*ID, *_TEXT, "title"))):
            name, text = _named(where, row)
            title = row.get("title")
            yield name, {"_id": name, "title": title if isinstance(title, str) else "", "text": text}

    def _queries(self, part: Part, judged: set[str]) -> Iterator[tuple[str, JsonObject]]:
        for where, row in _whole(part.rows((*ID, *_TEXT))):
            name, text = _named(where, row)
            if name in judged:
                yield name, {"_id": name, "text": text}


@dataclass(frozen=True)
class StsSet:
    """pairs of sentences with people's scores, as MTEB's STS sets hold them

    Columns sentence1, sentence2 and score. `--name` is the task's in MTEB (STS12, SICK-R, STSBenchmark). The paper's
    STS17 is the subset en-en, its STS22 en: `--subset en-en`.
    """

    kind: ClassVar[str] = "pairs"

    data: str = argument("folder or file (.jsonl, .jsonl.gz, .parquet), or OWNER/NAME on the hub (mteb/sts12-sts)")
    split: str = option("test", "split to take")
    subset: str = option("", "of several languages: a configuration, or the value of the column lang")

    def write(self, folder: Path) -> dict[str, int]:
        pairs = [fields for fields in self._pairs() if self.subset in ("", fields.pop("lang", self.subset))]
        if not pairs:
            raise UserError(f"{self.data}: no pair" + (f" whose lang is {self.subset!r}" if self.subset else ""))
        _write_lines(folder / "test.jsonl", ((str(number), pair) for number, pair in enumerate(pairs)))
        return {"pairs": len(pairs)}

    def _pairs(self) -> Iterator[JsonObject]:
        path = Path(self.data)
        named = path.is_dir() or path.is_file()
        config = "" if named and not (path / "README.md").is_file() else self.subset
        for piece in find_files(self.data, config, self.split, "", lone=True).pieces(1_000_000):
            for where, row in _whole(objects(_rows(piece))):
                left, right, score = (row.get(name) for name in _PAIR)
                number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
                if not isinstance(left, str) or not isinstance(right, str) or not number:
                    raise UserError(f"{where}: expected sentence1, sentence2 and a number as score, found {row!s:.120}")
                yield {**dict(zip(_PAIR, (left, right, score), strict=True)), **_lang(row)}


TEXT_EVALSETS: dict[str, type[BeirSet] | type[StsSet]] = {"beir": BeirSet, "sts": StsSet}


def write_text_set(source: TextSet, out: Path, name: str) -> JsonObject:
    """Writes a set as `out`/text/`name`, whole or not at all; returns its set.json.

    Raises:
        UserError, ShardError: it is there already, its source is not whole, or the disk refuses.
    """
    target = out / FOLDER / check_name(name, "name")
    partial = target.with_name(f"{target.name}.partial")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(target.with_name(f".{name}.lock"), f"{target} is being written: it"):
            if target.exists():
                raise UserError(f"{target} exists already; name another place, or remove it to make it again")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                counts = source.write(partial)
                described = {
                    "schema": SCHEMA,
                    "kind": source.kind,
                    "name": name,
                    "from": asdict(source),  # type: ignore[call-overload]
                    "counts": counts,
                    "files": _files(partial),
                }
                write_file(partial / "set.json", (json.dumps(described, indent=1, ensure_ascii=False) + "\n").encode())
                partial.rename(target)
                sync(target.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return described


def _files(folder: Path) -> Mapping[str, JsonObject]:
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def _write_lines(path: Path, rows: Iterator[tuple[str, JsonObject]]) -> set[str]:
    """The ids of what was written; UserError if two rows have the same."""
    written: set[str] = set()
    with path.open("w", encoding="utf-8") as file:
        for name, fields in rows:
            if name in written:
                raise UserError(
                    f"two rows of {path.stem} have the id {name!r}; if the folder holds several sets, name one"
                )
            written.add(name)
            try:
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")
            except UnicodeEncodeError as error:
                raise UserError(f"{path.stem}: the text of {name!r} has half a character ({error.reason})") from error
    sync(path)
    return written


def _whole(rows: Iterator[tuple[str, JsonObject] | Dropped]) -> Iterator[tuple[str, JsonObject]]:
    for row in rows:
        if isinstance(row, Dropped):
            raise UserError(f"{row.where}: {row.reason}; without it the set would not be whole")
        yield row


def _named(where: str, row: JsonObject) -> tuple[str, str]:
    name = next((found for column in ID if (found := same_id(row.get(column))) is not None), None)
    text = next((row[column] for column in _TEXT if isinstance(row.get(column), str)), None)
    if name is None or text is None:
        raise UserError(f"{where}: expected an id and a text, found {row!s:.120}")
    return name, text


def _rows(piece: JsonObject) -> Iterator[Row | Dropped]:
    if piece["format"] == "lines":
        return read_lines(piece)
    return (read_parquet if piece["format"] == "parquet" else read_arrow)(piece, (*_PAIR, "lang"))


def _lang(row: JsonObject) -> JsonObject:
    return {"lang": row["lang"]} if isinstance(row.get("lang"), str) else {}
