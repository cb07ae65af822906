"""The ledger: requests, answers and costs in one SQLite file. The states of a request:

    planned ──→ sent ──→ received ──→ accepted | rejected (reason)
       ↑          │
       └──────────┘ the service did nothing (429, 5xx), or was never reached

`sent` is committed before the request leaves, and the raw answer before it is parsed. So a request that a crash leaves
at `sent` may have been paid for; it stays there, is listed, and is sent again only when the user asks for that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from data_prep.errors import UserError
from data_prep.shards.format import JsonObject, parse_json

SCHEMA = 1
_TABLES = """
CREATE TABLE recipe (id INTEGER PRIMARY KEY, model TEXT NOT NULL, prompt_version TEXT NOT NULL, options TEXT NOT NULL,
    UNIQUE (model, prompt_version, options));
CREATE TABLE prompt (version TEXT, language TEXT, sha256 TEXT NOT NULL, text TEXT NOT NULL,
    PRIMARY KEY (version, language));
CREATE TABLE image (sha256 TEXT PRIMARY KEY, dataset TEXT NOT NULL, number INTEGER NOT NULL);
CREATE TABLE request (id TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES image, language TEXT NOT NULL,
    recipe INTEGER NOT NULL REFERENCES recipe, batch INTEGER REFERENCES batch, caption TEXT, reason TEXT,
    signature BLOB, state TEXT NOT NULL CHECK (state IN ('planned', 'sent', 'received', 'accepted', 'rejected')));
CREATE INDEX request_by_state ON request (state, language);
CREATE INDEX request_unsigned ON request (id) WHERE state = 'accepted' AND signature IS NULL;
CREATE INDEX request_by_image ON request (image);
CREATE INDEX request_by_batch ON request (batch);
CREATE TABLE attempt (id INTEGER PRIMARY KEY, request TEXT NOT NULL REFERENCES request, sent_at REAL NOT NULL,
    ended_at REAL, status INTEGER, note TEXT, raw BLOB, model TEXT, fingerprint TEXT, prompt_tokens INTEGER,
    completion_tokens INTEGER, cost REAL);
CREATE INDEX attempt_by_request ON attempt (request);
CREATE TABLE batch (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, remote TEXT, file TEXT, created_at REAL NOT NULL,
    state TEXT NOT NULL, note TEXT);
"""
_NO_BATCH_WILL_ANSWER = "(batch IS NULL OR batch NOT IN (SELECT id FROM batch WHERE state IN ('creating', 'open')))"
_REQUESTS = (
    "SELECT request.rowid AS place, request.*, recipe.*, image.*, prompt.text, request.id AS id FROM request "
    "JOIN recipe ON recipe.id = request.recipe JOIN image ON image.sha256 = request.image "
    "JOIN prompt ON prompt.version = recipe.prompt_version AND prompt.language = request.language"
)


@dataclass(frozen=True)
class Request:
    """A request to send: `options` are fields of the body, `text` is the prompt."""

    id: str
    image: str
    language: str
    model: str
    prompt_version: str
    options: JsonObject
    text: str
    dataset: str
    number: int


@dataclass(frozen=True)
class Usage:
    """The metadata of an answer; None where the service gives none."""

    model: str | None = None
    fingerprint: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def request_id(image: str, language: str, prompt_version: str, model: str, options: JsonObject) -> str:
    """The key of a request: 128 bits of the sha256 of everything that the caption depends on."""
    parts = json.dumps([image, language, prompt_version, model, options], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


class RequestLedger:
    """An open ledger. Only one process at a time may change a ledger's requests: see `exclusive`."""

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        self.path = Path(path)
        if not create and not self.path.exists():
            raise UserError(f"{self.path}: no such ledger; make one with `data-prep captions plan {self.path} SHARDS`")
        if (
            not create and not self.path.stat().st_size
        ):  # SQLite would make a new one of it, and drop the journal beside it
            raise UserError(f"{self.path}: is empty; restore it from a copy, or what it had bought is bought again")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if create:
                self.path.touch()  # with the umask's permissions; SQLite would drop group write
            self._check()
            self.db = sqlite3.connect(self.path, isolation_level=None, timeout=30)
            self.db.row_factory = sqlite3.Row
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = FULL")  # a commit must survive a power cut: it stands for money
            found = self.db.execute("PRAGMA user_version").fetchone()[0]
            if not found:
                self.db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
            elif found != SCHEMA:
                raise UserError(f"{self.path}: a ledger of schema {found}, expected {SCHEMA}; take another file")
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(f"{self.path}: not a ledger, or the disk refuses it ({error})") from error

    def _check(self) -> None:
        """Find pages that are damaged; one of zeros would read as one without rows, and a run as having nothing to do.

        By a connection that cannot write: another would move the journal into the damaged file, and be rid of it.
        """
        with closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)) as db:
            damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise UserError(f"{self.path} is damaged ({' '.join(damage.split())}); restore it from a copy")

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the ledger against other runs; the system releases the lock when the process ends, however it ends.

        Not `shards.alone`, which goes on where the file system has no locks: here two runs might pay twice.

        Raises:
            UserError: another process holds it, or the disk refuses what is written meanwhile.
        """
        try:
            lock = open(f"{self.path}.lock", "w")  # noqa: SIM115 (closed below, which is what frees it)
        except OSError as error:
            raise UserError(f"{self.path}.lock: cannot be written ({error.strerror}); fix it and run again") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.path} is in use by another run; wait for it or stop it") from error
            except OSError as error:  # without locks two runs might pay twice
                raise UserError(
                    f"{self.path}: this file system has no locks ({error.strerror}); put the ledger on another one"
                ) from error
            try:
                yield
            except sqlite3.OperationalError as error:
                raise UserError(f"{self.path} cannot be written ({error}); free some space and run again") from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit everything inside together, or nothing; a nested transaction is part of the outer one."""
        if self.db.in_transaction:
            yield self.db
            return
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield self.db
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:  # a full disk may have ended it already; or it would hold what follows open, too
                self.db.execute("ROLLBACK")
            raise

    # --- planned requests

    def planned(self, limit: int, *, after: int = 0) -> list[tuple[int, Request]]:
        """The next `limit` planned requests behind row `after`, in the order in which they were planned."""
        rows = self.db.execute(
            f"{_REQUESTS} WHERE +state = 'planned' AND request.rowid > ? ORDER BY request.rowid LIMIT ?", (after, limit)
        )
        return [(row["place"], _request(row)) for row in rows]

    def request(self, id: str) -> Request:
        """The request of this id, which has to be there."""
        return _request(self.db.execute(f"{_REQUESTS} WHERE request.id = ?", (id,)).fetchone())

    def sample(self, limit: int) -> list[Request]:
        """A sample of the planned requests, by their ids, which are hashes: the same for the same ledger."""
        rows = self.db.execute(f"{_REQUESTS} WHERE state = 'planned' ORDER BY request.id LIMIT ?", (limit,))
        return [_request(row) for row in rows]

    def reopen(self, what: str) -> int:
        """Plan again what was answered or lost: "perhaps-paid", a reason of rejection, or one request's id.

        Returns how many. Requests in an open batch are left alone: their answers are still to come.

        Raises:
            UserError: nothing in the ledger is called so.
        """
        changed = self.db.execute(
            "UPDATE request SET state = 'planned', reason = NULL, caption = NULL, batch = NULL WHERE "
            f"(? = 'perhaps-paid' AND state = 'sent' AND {_NO_BATCH_WILL_ANSWER}) "
            "OR (state = 'rejected' AND reason = ?) "
            f"OR (id = ? AND state IN ('sent', 'rejected', 'accepted') AND {_NO_BATCH_WILL_ANSWER})",
            (what, what, what),
        ).rowcount
        if not changed:
            reasons = self.db.execute("SELECT DISTINCT reason FROM request WHERE state = 'rejected' ORDER BY 1")
            names = ["perhaps-paid", *(row[0] for row in reasons), "or a request's id"]
            raise UserError(f"nothing to ask again under {what!r}; there are: {', '.join(names)}")
        return changed

    def unplan(
        self,
        *,
        datasets: Sequence[str] = (),
        languages: Sequence[str] = (),
        model: str | None = None,
        prompt_version: str | None = None,
    ) -> tuple[int, int]:
        """Take requests that were never sent out of the ledger, with the prompts and images that nothing else needs.

        Nothing given chooses all. Returns (how many went, how many of the planned ones stay because they were asked for
        before).

        Args:
            datasets: directories as the ledger names them; requests for the images that it found there.

        Raises:
            UserError: nothing that is planned is chosen by this.
        """
        chosen = ["state = 'planned'"]
        values: list[str] = []
        for column, wanted in (
            ("image.dataset", datasets),
            ("request.language", languages),
            ("recipe.model", [model] if model is not None else []),
            ("recipe.prompt_version", [prompt_version] if prompt_version is not None else []),
        ):
            if wanted:
                chosen.append(f"{column} IN ({', '.join('?' * len(wanted))})")
                values += wanted
        requests = (
            "SELECT request.id FROM request JOIN recipe ON recipe.id = request.recipe "
            f"JOIN image ON image.sha256 = request.image WHERE {' AND '.join(chosen)}"
        )
        with self.transaction() as db:
            (planned,) = db.execute(f"SELECT count(*) FROM ({requests})", values).fetchone()
            if not planned:
                raise UserError(
                    f"{self.path}: nothing that is planned fits; see `data-prep captions status {self.path}`"
                )
            taken = db.execute(
                f"DELETE FROM request WHERE id IN ({requests} EXCEPT SELECT request FROM attempt)", values
            ).rowcount
            db.execute("DELETE FROM image WHERE sha256 NOT IN (SELECT image FROM request)")
            db.execute("DELETE FROM recipe WHERE id NOT IN (SELECT recipe FROM request)")
            db.execute(
                "DELETE FROM prompt WHERE (version, language) NOT IN (SELECT prompt_version, language FROM request "
                "JOIN recipe ON recipe.id = request.recipe)"
            )
        return taken, planned - taken

    # --- state changes

    def sent(self, requests: Iterable[tuple[str, float | None]], *, now: float) -> list[int]:
        """Commit that these requests (id, maximal cost) are about to leave; returns the numbers of the attempts."""
        with self.transaction() as db:
            attempts = []
            for request, most in requests:
                changed = db.execute("UPDATE request SET state = 'sent' WHERE id = ? AND state = 'planned'", (request,))
                if changed.rowcount != 1:
                    raise RuntimeError(f"request {request} is not planned; it must not be sent")
                entry = "INSERT INTO attempt (request, sent_at, cost) VALUES (?, ?, ?)"
                attempts.append(db.execute(entry, (request, now, most)).lastrowid)
        return attempts  # type: ignore[return-value]

    def received(self, attempt: int, status: int, raw: bytes, *, now: float) -> None:
        """Commit a raw answer. Its cost stays the maximum until `judged` sets it."""
        self._note(attempt, "received", ended_at=now, status=status, raw=raw)

    def judged(self, attempt: int, caption: str | None, reason: str | None, usage: Usage, cost: float | None) -> None:
        """Commit the verdict on an answer: a caption, or the reason of its rejection."""
        known = asdict(usage) if cost is None else {**asdict(usage), "cost": cost}
        self._note(attempt, "rejected" if reason else "accepted", reason, caption, **known)

    def not_done(self, attempt: int, status: int | None, note: str, *, now: float) -> None:
        """Commit that nothing was computed, so nothing is due: the request is planned again."""
        self._note(attempt, "planned", ended_at=now, status=status, note=note, cost=0)

    def lost(self, attempt: int, note: str, *, now: float) -> None:
        """Commit that the outcome is unknown: the request stays `sent`, its cost stays the maximum."""
        self._note(attempt, None, ended_at=now, note=note)

    def priced(self, attempt: int, cost: float) -> None:
        """Commit the cost of an attempt that was made without prices."""
        self._note(attempt, None, cost=cost)

    def _note(
        self, attempt: int, state: str | None, reason: str | None = None, caption: str | None = None, **columns: object
    ) -> None:
        """Set columns of an attempt and, unless it is None, the state of its request."""
        with self.transaction() as db:
            assigned = ", ".join(f"{name} = ?" for name in columns)
            db.execute(f"UPDATE attempt SET {assigned} WHERE id = ?", (*columns.values(), attempt))
            if state is not None:
                db.execute(
                    "UPDATE request SET state = ?, reason = ?, caption = ?, signature = NULL, "
                    "batch = CASE ? WHEN 'planned' THEN NULL ELSE batch END "
                    "WHERE id = (SELECT request FROM attempt WHERE id = ?)",
                    (state, reason, caption, state, attempt),
                )

    # --- queries

    def spent(self) -> float:
        """The cost of all answers, and the maximal cost of attempts that are under way or lost.

        Attempts made without prices count as 0 until `price_unpriced` sets their cost.
        """
        total: float = self.db.execute("SELECT total(cost) FROM attempt").fetchone()[0]
        return total

    def unpriced(self) -> list[sqlite3.Row]:
        """Attempts made without prices: (id, request, prompt_tokens, completion_tokens, in_batch)."""
        return self.db.execute(
            "SELECT attempt.id, request, prompt_tokens, completion_tokens, "
            # A request has the batch of its last attempt only; older ones count in full, which is the maximum.
            "batch IS NOT NULL AND attempt.id = (SELECT max(id) FROM attempt WHERE request = request.id) AS in_batch "
            "FROM attempt JOIN request ON request.id = attempt.request WHERE cost IS NULL"
        ).fetchall()

    def unjudged(self) -> list[sqlite3.Row]:
        """Answers that were committed but not judged: a run was killed between the two."""
        return self.db.execute(
            "SELECT attempt.id, attempt.raw, attempt.status, request.language, request.batch FROM request "
            "JOIN attempt ON attempt.request = request.id WHERE state = 'received' AND "
            "attempt.id = (SELECT max(id) FROM attempt WHERE request = request.id)"
            " ORDER BY attempt.id"
        ).fetchall()

    def perhaps_paid(self) -> list[sqlite3.Row]:
        """Requests at `sent` that no open batch will answer: (id, language, dataset, number, sent_at, note)."""
        return self.db.execute(
            "SELECT request.id, language, dataset, number, max(sent_at) AS sent_at, note FROM request "
            "JOIN attempt ON attempt.request = request.id JOIN image ON image.sha256 = request.image "
            f"WHERE state = 'sent' AND {_NO_BATCH_WILL_ANSWER} GROUP BY request.id ORDER BY request.rowid"
        ).fetchall()


def _request(row: sqlite3.Row) -> Request:
    values = {field.name: row[field.name] for field in fields(Request)}
    return Request(**{**values, "options": parse_json(row["options"])})
