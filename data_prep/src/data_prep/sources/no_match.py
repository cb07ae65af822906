"""Rows that are labelled as no match: hard negatives of the rows with the same query that are labelled as a match.

The rows of a query may stand far apart, and in several files. So one unit reads the files with labels once more, and
sorts their rows on the disk, in a database of SQLite's that has no name and goes with the process: memory does not
grow.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby
from typing import Any

from data_prep.errors import UserError
from data_prep.samples import Text
from data_prep.shards.format import parse_json
from data_prep.sources.records import Dropped, Found, NoMatch, TextRecord

LABELLED = "labelled as no match"
_MOST = 64  # positives of a triplet; each is a pair as well
_COLUMNS = "key BLOB, number INTEGER, match INTEGER, source TEXT, place TEXT, query TEXT, target TEXT"
# Queries in the order of their first rows, of each the matches first.
_SORTED = """
    SELECT key, match, source, place, query, target FROM rows
    ORDER BY MIN(number) OVER (PARTITION BY key), match DESC, number
"""


def left_for_later(found: Iterable[Found | NoMatch], *, gathered: bool) -> Iterator[Found]:
    """What was found, without rows that are no match: a unit of their own has them if they are `gathered`."""
    for one in found:
        if not isinstance(one, NoMatch):
            yield one
        elif not gathered:
            yield _dropped("", LABELLED, one.where, one.query, one.target)


def hard_negatives(rows: Iterable[tuple[str, Found | NoMatch]], count: int) -> Iterator[Found]:
    """Triplets of queries that have a match and at least `count` others; the other rows without a match as dropped.

    Args:
        rows: the file and what was found in it, of all rows of the files with labels. The pairs among them go out from
            elsewhere.

    Raises:
        UserError: the disk does not take the rows.
    """
    try:
        with closing(sqlite3.connect("", isolation_level=None)) as database:  # without a name: on the disk, and private
            for pragma in ("temp_store = FILE", "journal_mode = OFF", "cache_size = -16384"):
                database.execute(f"PRAGMA {pragma}")
            database.execute(f"CREATE TABLE rows ({_COLUMNS})")
            database.execute("BEGIN")
            database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?)", _stored(rows))
            for _, group in groupby(database.execute(_SORTED), key=lambda row: row[0]):
                yield from _of_query(group, count)
    except sqlite3.Error as error:
        raise UserError(
            f"rows with labels cannot be sorted on the disk ({error}) in {tempfile.gettempdir()}; free some space, "
            "choose another folder (TMPDIR), or drop those that are no match: --no-match none"
        ) from error


def _stored(rows: Iterable[tuple[str, Found | NoMatch]]) -> Iterator[tuple[Any, ...]]:
    for number, (source, one) in enumerate(rows):
        if isinstance(one, TextRecord | NoMatch):
            key = hashlib.blake2b(_plain(one.query[0].text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
            names = (json.dumps(name) for name in (source, one.where))  # as JSON, names may be no UTF-8
            texts = (json.dumps([text.record() for text in side]) for side in (one.query, one.target))
            yield (key, number, isinstance(one, TextRecord), *names, *texts)


def _of_query(group: Iterable[tuple[Any, ...]], count: int) -> Iterator[Found]:
    """The rows of one query, the matches first: a triplet, or none."""
    first: tuple[str, list[Text]] | None = None
    right: dict[str, Text] = {}
    known: set[str] = set()
    negatives: list[tuple[str, str, list[Text], list[Text]]] = []
    for _, match, source, where, *sides in group:
        source, where = parse_json(source), parse_json(where)
        query, target = ([Text(**text) for text in parse_json(side)] for side in sides)
        if match:
            first = first or (where, query)
            known.update(_plain(text.text) for text in target)
            right.update((text.text, text) for text in target if len(right) < _MOST)
            continue
        if first is None:
            reason = "no match, of a query without a match in any row"
        elif any(_plain(text.text) in known for text in target):
            reason = "no match, but also a match of its query, or there twice"
        elif len(negatives) == count:
            reason = f"no match, beyond the first {count} of its query"
        else:
            known.update(_plain(text.text) for text in target)
            negatives.append((source, where, query, target))
            continue
        yield _dropped(source, reason, where, query, target)
    if first is not None and len(negatives) == count:
        texts = [target for *_, target in negatives]
        yield TextRecord(first[0], first[1], list(right.values()), texts, rows=count)
        return
    for one in negatives:
        reason = f"no match, fewer than --negatives {count} of its query"
        yield _dropped(one[0], reason, *one[1:])


def _dropped(source: str, reason: str, where: str, query: Iterable[Text], target: Iterable[Text]) -> Dropped:
    texts = [text.text for side in (query, target) for text in side]
    return Dropped(reason, where, content=texts, source=source)


def _plain(text: str) -> str:
    """What two texts share that are one: neither spaces nor capitals count."""
    return " ".join(text.split()).casefold()
