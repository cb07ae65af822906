"""Collects the answers of batches: every request of one that has ended is answered, planned again, or perhaps paid.

A service's files may lack lines, or have them twice or without the request's id. A request without a line is planned
again only if the service counts no more answers than it gave; what was not computed by its line, in any case.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data_prep.captions import faults
from data_prep.captions.batch import NAME, Refused, described, translated_errors
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.service import Service
from data_prep.captions.settings import RunSettings
from data_prep.captions.verdicts import judge_one, judge_waiting
from data_prep.errors import UserError
from data_prep.shards.format import parse_json

if TYPE_CHECKING:
    from openai.types import Batch

_CHAT = "/v1/chat/completions"
_ENDED = {
    "completed": "completed complete succeeded success successful done finished ended",
    "expired": "expired timeout timed_out",
    "cancelled": "cancelled canceled",
    "failed": "failed failure error errored rejected",
}
_STATUSES = {word: status for status, words in _ENDED.items() for word in words.split()}
# The service's batches are read page by page where ours is looked for by name; a list need have no end.
_MOST_PAGES = 1000
_LONGEST_LISTING = 600.0  # seconds
_LONGEST_BATCH = 7 * 86_400.0  # seconds; a batch is due after a day. Its answers are taken even later, if they come


@dataclass
class Collected:
    """What `collect` found.

    open: batches still running; lost: requests perhaps paid that got no answer; unknown: answers to requests that the
    ledger does not have; failed: of batches that could not be collected now, why.
    """

    open: int = 0
    ended: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    planned_again: int = 0
    lost: int = 0
    unknown: int = 0
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


async def collect(
    ledger: RequestLedger, service: Service, settings: RunSettings, *, tick: Callable[[], None] = lambda: None
) -> Collected:
    """Collect the answers of every batch that has ended; what they did not answer is planned again, or perhaps paid.

    `tick` is called for each answer. A batch that cannot be collected does not stop the others.

    Raises:
        UserError: the service refuses the key, or another run holds the ledger.
    """
    found = Collected()
    with ledger.exclusive():
        judge_waiting(ledger, settings)
        for row in ledger.db.execute(
            "SELECT * FROM batch WHERE state IN ('open', 'creating') OR state = 'lost' AND remote IS NOT NULL "
            "AND EXISTS (SELECT 1 FROM request WHERE batch = batch.id AND state = 'sent') ORDER BY id"
        ).fetchall():
            try:
                await _Collecting(ledger, service, settings, row, found, tick).drive()
            except UserError as error:
                if isinstance(error, Refused) and error.status in (faults.NO_KEY, faults.NO_MONEY):
                    raise
                found.failed.append(f"batch {row['remote'] or row['name']}: {error}")
    return found


@dataclass
class _Collecting:
    """One batch."""

    ledger: RequestLedger
    service: Service
    settings: RunSettings
    row: sqlite3.Row
    found: Collected
    tick: Callable[[], None]

    async def drive(self) -> None:
        with translated_errors(self.service):
            remote, why = await self._remote()
        if remote is None:
            self._lose(self.row["name"], why)
            return
        self.ledger.db.execute("UPDATE batch SET state = 'open', remote = ? WHERE id = ?", (remote.id, self.row["id"]))
        status = _STATUSES.get(remote.status.lower())
        if status is None:
            self.found.open += 1
            if time.time() - self.row["created_at"] > _LONGEST_BATCH:
                self._lose(remote.id, f"{remote.status} for more than a week")
            return
        try:
            with translated_errors(self.service):
                await self._take(remote, status)
        except Refused as error:
            if error.status != 404:
                raise
            self._lose(remote.id, f"its answers are gone ({error})")

    def _lose(self, name: str, why: str) -> None:
        """Commit that a batch's requests are perhaps paid. Their answers are taken all the same if they come later."""
        with self.ledger.transaction() as db:
            db.execute("UPDATE batch SET state = 'lost', note = ? WHERE id = ?", (why[:300], self.row["id"]))
            if self.row["state"] != "lost":
                for attempt in self.ledger.unanswered(self.row["id"]).values():
                    self.ledger.lost(attempt, f"batch {name}: {why}"[:300], now=time.time())
        self.found.notes.append(f"batch {name}: {why}; its requests are perhaps paid, see `captions status`")

    async def _remote(self) -> tuple[Batch | None, str]:
        """The service's batch, by its id, or by our name for it if a crash lost the id; or None, and why."""
        unknown = f"{self.service.url}: the service does not know it"
        if self.row["remote"]:
            try:
                return described(self.service, await self.service.client.batches.retrieve(self.row["remote"])), ""
            except self.service.openai.NotFoundError:
                return None, unknown
        seen: set[str] = set()
        started = time.monotonic()
        try:
            page = await self.service.client.batches.list(limit=100)
            for _ in range(_MOST_PAGES):
                new = [remote for remote in page.data if remote.id and remote.id not in seen]
                if page.data and not seen and not new:
                    described(self.service, page.data[0])
                for remote in new:
                    if self._is_ours(described(self.service, remote)):
                        return remote, ""
                seen.update(remote.id for remote in new)
                if not page.has_next_page():
                    return None, unknown
                if not new:
                    return None, f"{unknown}, whose list of batches repeats itself"
                if time.monotonic() - started > _LONGEST_LISTING:
                    break
                page = await page.get_next_page()
        except (AttributeError, TypeError) as error:  # of the client, where the answer is no page of a list
            raise UserError(f"{self.service.url} lists no batches; see what is wrong there and run again") from error
        return None, f"{unknown} by its first {len(seen)} batches, and the list has no end"

    def _is_ours(self, remote: Batch) -> bool:
        if isinstance(remote.metadata, dict) and remote.metadata:
            return bool(remote.metadata.get(NAME) == self.row["name"])
        return bool(remote.input_file_id) and remote.input_file_id == self.row["file"]  # it keeps no names

    async def _take(self, remote: Batch, status: str) -> None:
        """Match an ended batch's answers to requests by `custom_id`, and decide about those without one."""
        number = self.row["id"]
        waiting = self.ledger.unanswered(number)
        places = dict(self.ledger.db.execute("SELECT id, place FROM request WHERE batch = ?", (number,)).fetchall())
        done: set[int] = set()  # places of requests with a 200, here or earlier
        not_computed: set[int] = set()
        for file in (remote.output_file_id, remote.error_file_id):
            if not file:
                continue
            content = await self.service.client.files.content(file)
            for line in content.content.splitlines():
                if not line.strip():
                    continue
                request, code, raw = _answer(line)
                place = places.get(request) if request is not None else None
                if place is None or code is None:
                    self.found.unknown += 1
                elif code in (faults.LIMITED, 408, 409, 425) or code >= 500 or faults.stopping(code, raw):
                    not_computed.add(place)
                else:
                    done |= {place} if code == 200 else set()
                    if (attempt := waiting.pop(place, None)) is not None:
                        self._keep(place, attempt, code, raw)
        errors = getattr(remote.errors, "data", None)
        message = getattr(errors[0], "message", None) if isinstance(errors, list) and errors else None
        note = f"{status}{f': {self.service.hide(str(message))}' if message else ''}"[:300]
        note = note.encode("utf-8", "replace").decode()
        self._settle(waiting, not_computed, _counted(remote, status, len(done), len(places)) > len(done), note)
        if status != "completed":
            self.found.notes.append(f"batch {remote.id}: {note}")
        self.ledger.db.execute("UPDATE batch SET state = 'ended', note = ? WHERE id = ?", (note, number))
        self.found.ended += 1

    def _keep(self, place: int, attempt: int, code: int, raw: bytes) -> None:
        """Commit an answer and its verdict."""
        raw = self.service.hide_in(raw, message=code != 200)
        self.ledger.received(attempt, code, raw, now=time.time())
        (language,) = self.ledger.db.execute("SELECT language FROM request WHERE place = ?", (place,)).fetchone()
        verdict, _ = judge_one(self.ledger, self.settings, attempt, code, raw, language, batch=True)
        self.found.accepted += verdict.reason is None
        self.found.rejected.update([verdict.reason] if verdict.reason else [])
        self.tick()

    def _settle(self, waiting: dict[int, int], not_computed: set[int], missing: bool, note: str) -> None:
        """Plan again what was not computed. `missing`: answers that are in no file were made, the rest may be paid."""
        for place, attempt in waiting.items():
            if missing and place not in not_computed:
                told = f"batch {note}, without a line about this request, though the service counts more answers"
                self.ledger.lost(attempt, told, now=time.time())
                self.found.lost += 1
            else:
                self.ledger.not_done(attempt, None, f"batch {note}"[:300], now=time.time())
                self.found.planned_again += 1


def _counted(remote: Batch, status: str, done: int, sent: int) -> int:
    """How many of the requests sent the service answered, as it says; all, if it is done and its counts are none."""
    counts = remote.request_counts
    total, completed, failed = (getattr(counts, name, None) for name in ("total", "completed", "failed"))
    whole = type(completed) is int and total == sent
    if type(completed) is int and whole and (status != "completed" or completed + (failed or 0) == total):
        return completed
    return max(done, sent) if status == "completed" else done


def _answer(line: bytes) -> tuple[str | None, int | None, bytes]:
    """(custom_id, status, body) of a line of an output or error file; a status of 500 for what was not computed.

    Without an id or a status where nobody can tell.
    """
    try:
        entry = parse_json(line)
        request, response = entry["custom_id"], entry.get("response")
        if not isinstance(request, str):
            return None, None, b""
        if response is None or entry.get("error"):
            return request, faults.FAILED, b""
        status, raw = int(response["status_code"]), json.dumps(response["body"], ensure_ascii=False)
        if not 100 <= status < 1000:
            return request, None, b""
        body = raw.encode("utf-8", "replace")
        return request, (faults.disguised(_CHAT, body) or 200) if status == 200 else status, body
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        return None, None, b""
