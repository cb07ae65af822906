"""The ledger: requests, answers and costs in one SQLite file. The states of a request:

    planned ──→ sent ──→ received ──→ accepted | rejected (reason)
       ↑          │
       └──────────┘ the service did nothing (429, 5xx), or was never reached

`sent` is committed before the request leaves, and the raw answer before it is parsed. So a request that a crash leaves
at `sent` may have been paid for; it stays there, is listed, and is sent again only when the user asks for that. A
request that failed again and again while others were answered is set aside: `rejected`, with the reason `failed`.
"""

from __future__ import annotations

import os
import random
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from data_prep.captions.ledger_file import locked, open_ledger
from data_prep.captions.request import Request, Usage
from data_prep.errors import UserError
from data_prep.shards.format import parse_json

_NO_BATCH_WILL_ANSWER = "(batch IS NULL OR batch NOT IN (SELECT id FROM batch WHERE state IN ('creating', 'open')))"
_REQUESTS = (
    "SELECT request.place, request.id, request.language, recipe.model, recipe.prompt_version, recipe.options, "
    "image.sha256 AS image, image.dataset, image.number, prompt.text FROM request "
    "JOIN recipe ON recipe.id = request.recipe JOIN image ON image.id = request.image "
    "JOIN prompt ON prompt.version = recipe.prompt_version AND prompt.language = request.language"
)
_LAST_ATTEMPT = "(SELECT max(id) FROM attempt WHERE request = place)"


class RequestLedger:
    """An open ledger. Only one process at a time may change a ledger's requests: see `exclusive`."""

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        self.path = Path(path)
        self.db = open_ledger(self.path, create=create)

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the ledger against other runs.

        Raises:
            UserError: another process holds it, or the disk refuses what is written meanwhile.
        """
        with locked(self.path):
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

    def planned(self, limit: int, *, after: int = 0) -> list[Request]:
        """The next `limit` planned requests behind place `after`, in the order in which they were planned."""
        rows = self.db.execute(
            f"{_REQUESTS} WHERE +state = 'planned' AND request.place > ? ORDER BY request.place LIMIT ?", (after, limit)
        )
        return [_request(row) for row in rows]

    def planned_images(self) -> array[int]:
        """The ledger's numbers of the images about which requests are planned."""
        rows = self.db.execute("SELECT DISTINCT image FROM request WHERE state = 'planned'")
        return array("q", (row[0] for row in rows))

    def planned_models(self) -> set[str]:
        """The models of the planned requests."""
        some = "SELECT 1 FROM request WHERE state = 'planned' AND recipe = recipe.id"
        return {row[0] for row in self.db.execute(f"SELECT model FROM recipe WHERE EXISTS ({some})")}

    def planned_about(self, images: Sequence[int]) -> list[Request]:
        """The planned requests about these images."""
        marks = ", ".join("?" * len(images))
        rows = self.db.execute(f"{_REQUESTS} WHERE state = 'planned' AND request.image IN ({marks})", images)
        return [_request(row) for row in rows]

    def request(self, place: int) -> Request:
        """The request at this place, which has to be there."""
        return _request(self.db.execute(f"{_REQUESTS} WHERE request.place = ?", (place,)).fetchone())

    def sample(self, limit: int) -> list[Request]:
        """A sample of the planned requests, of as many images as can be: the same for the same ledger."""
        draw, images = random.Random(0), self.planned_images()
        about = self.planned_about(draw.sample(images, min(limit, len(images))))
        return draw.sample(about, min(limit, len(about)))

    def reopen(self, what: str) -> int:
        """Plan again what was answered or lost: "perhaps-paid", a reason of rejection, or one request's id.

        Returns how many. Requests in an open batch are left alone: their answers are still to come.

        Raises:
            UserError: nothing in the ledger is called so.
        """
        chosen = {
            f"? = 'perhaps-paid' AND state = 'sent' AND {_NO_BATCH_WILL_ANSWER}": True,
            "state = 'rejected' AND reason = ?": True,
            # No index has the ids, so that all requests are read.
            f"id = ? AND state IN ('sent', 'rejected', 'accepted') AND {_NO_BATCH_WILL_ANSWER}": len(what) == 32,
        }
        changed = 0
        with self.transaction() as db:
            for condition in (condition for condition, asked in chosen.items() if asked):
                places = f"SELECT place FROM request WHERE {condition}"
                db.execute(f"DELETE FROM signature WHERE request IN ({places})", (what,))
                changed += db.execute(
                    "UPDATE request SET state = 'planned', reason = NULL, caption = NULL, batch = NULL, signed = NULL "
                    f"WHERE place IN ({places})",
                    (what,),
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
            "SELECT place FROM request JOIN recipe ON recipe.id = request.recipe "
            f"JOIN image ON image.id = request.image WHERE {' AND '.join(chosen)}"
        )
        with self.transaction() as db:
            (planned,) = db.execute(f"SELECT count(*) FROM ({requests})", values).fetchone()
            if not planned:
                raise UserError(
                    f"{self.path}: nothing that is planned fits; see `data-prep captions status {self.path}`"
                )
            taken = db.execute(
                f"DELETE FROM request WHERE place IN ({requests} EXCEPT SELECT request FROM attempt)", values
            ).rowcount
            db.execute("DELETE FROM image WHERE id NOT IN (SELECT image FROM request)")
            db.execute("DELETE FROM recipe WHERE id NOT IN (SELECT recipe FROM request)")
            db.execute(
                "DELETE FROM prompt WHERE (version, language) NOT IN (SELECT prompt_version, language FROM request "
                "JOIN recipe ON recipe.id = request.recipe)"
            )
        return taken, planned - taken

    # --- state changes

    def sent(self, requests: Iterable[tuple[int, float | None]], *, now: float) -> list[int]:
        """Commit that these requests (place, maximal cost) are about to leave; returns the numbers of the attempts."""
        with self.transaction() as db:
            attempts = []
            for request, most in requests:
                leaving = "UPDATE request SET state = 'sent' WHERE place = ? AND state = 'planned'"
                if db.execute(leaving, (request,)).rowcount != 1:
                    raise RuntimeError(f"request {request} is not planned; it must not be sent")
                entry = "INSERT INTO attempt (request, sent_at, cost) VALUES (?, ?, ?)"
                attempts.append(db.execute(entry, (request, now, most)).lastrowid)
        return attempts  # type: ignore[return-value]

    def received(self, attempt: int, status: int, raw: bytes, *, now: float) -> None:
        """Commit a raw answer. Its cost stays the maximum until `judged` sets it."""
        self._note(attempt, "received", ended_at=now, status=status, raw=raw)

    def judged(
        self,
        attempt: int,
        caption: str | None,
        reason: str | None,
        usage: Usage,
        cost: float | None,
        rules: int | None = None,
    ) -> None:
        """Commit the verdict on an answer: a caption, or the reason of its rejection, and by which rules it is one."""
        known = asdict(usage) if cost is None else {**asdict(usage), "cost": cost}
        with self.transaction() as db:
            self._note(attempt, "rejected" if reason else "accepted", reason, caption, **known)
            db.execute(
                "UPDATE recipe SET most_tokens = max(most_tokens, ?) WHERE id = (SELECT recipe FROM request "
                "JOIN attempt ON attempt.request = request.place WHERE attempt.id = ?)",
                (usage.prompt_tokens or 0, attempt),
            )
            judged = "UPDATE request SET rules = ? WHERE place = (SELECT request FROM attempt WHERE id = ?)"
            db.execute(judged, (rules, attempt))

    def not_done(self, attempt: int, status: int | None, note: str, *, now: float) -> None:
        """Commit that nothing was computed, so nothing is due: the request is planned again."""
        self._note(attempt, "planned", ended_at=now, status=status, note=note, cost=0)

    def lost(self, attempt: int, note: str, *, now: float) -> None:
        """Commit that the outcome is unknown: the request stays `sent`, its cost stays the maximum."""
        self._note(attempt, None, ended_at=now, note=note)

    def set_aside(self, request: int) -> None:
        """Commit that a planned request is not asked again unless the user wants it: it failed too often."""
        self.db.execute(
            "UPDATE request SET state = 'rejected', reason = 'failed' WHERE place = ? AND state = 'planned'", (request,)
        )

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
                (request,) = db.execute("SELECT request FROM attempt WHERE id = ?", (attempt,)).fetchone()
                db.execute(
                    "UPDATE request SET state = ?, reason = ?, caption = ?, signed = NULL, "
                    "batch = CASE ? WHEN 'planned' THEN NULL ELSE batch END WHERE place = ?",
                    (state, reason, caption, state, request),
                )
                db.execute("DELETE FROM signature WHERE request = ?", (request,))

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
            f"batch IS NOT NULL AND attempt.id = {_LAST_ATTEMPT} AS in_batch "
            "FROM attempt JOIN request ON request.place = attempt.request WHERE cost IS NULL"
        ).fetchall()

    def unanswered(self, batch: int | None) -> dict[int, int]:
        """Place → last attempt, of the requests of a batch that have no answer."""
        rows = self.db.execute(
            f"SELECT place, {_LAST_ATTEMPT} FROM request WHERE batch = ? AND state = 'sent'", (batch,)
        )
        return dict(rows.fetchall())

    def failures(self, request: int) -> int:
        """How often the service failed at the request at this place, over all runs."""
        failed = "SELECT count(*) FROM attempt WHERE request = ? AND status >= 500"
        count: int = self.db.execute(failed, (request,)).fetchone()[0]
        return count

    def unjudged(self) -> list[sqlite3.Row]:
        """Answers that were committed but not judged: a run was killed between the two."""
        return self.db.execute(
            "SELECT attempt.id, attempt.raw, attempt.status, request.language, request.batch FROM request "
            f"JOIN attempt ON attempt.id = {_LAST_ATTEMPT} WHERE state = 'received' ORDER BY attempt.id"
        ).fetchall()

    def perhaps_paid(self) -> list[sqlite3.Row]:
        """Requests at `sent` that no open batch will answer: (id, language, dataset, number, sent_at, note)."""
        return self.db.execute(
            "SELECT request.id, language, dataset, number, sent_at, note FROM request "
            f"JOIN attempt ON attempt.id = {_LAST_ATTEMPT} JOIN image ON image.id = request.image "
            f"WHERE state = 'sent' AND {_NO_BATCH_WILL_ANSWER} ORDER BY place"
        ).fetchall()

    def in_trouble(self) -> list[sqlite3.Row]:
        """Images whose requests were set aside or declined: (dataset, number, reason, requests, status, note, raw).

        `requests` is how many of them; status, note and raw are of the last attempt.
        """
        return self.db.execute(
            "SELECT image.dataset, image.number, found.reason, requests, status, note, raw FROM "
            f"(SELECT image, reason, count(*) AS requests, max({_LAST_ATTEMPT}) AS last FROM request "
            "WHERE state = 'rejected' AND reason IN ('failed', 'declined') GROUP BY image, reason) AS found "
            "JOIN image ON image.id = found.image JOIN attempt ON attempt.id = last ORDER BY image.id, reason"
        ).fetchall()


def _request(row: sqlite3.Row) -> Request:
    values = {field.name: row[field.name] for field in fields(Request)}
    return Request(**{**values, "options": parse_json(row["options"])})
