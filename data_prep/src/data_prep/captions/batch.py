"""The Batch API: the same requests in files, answered within a day at half the price.

A batch's requests are committed as `sent` before the batch is created, like all requests. After a crash between the two
`collect` finds the batch by the name that the ledger gave it; requests of a batch that the service does not know are
listed as perhaps paid. What an expired or cancelled batch did not answer was not computed and is planned again.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.captions.images import ImageReader
from data_prep.captions.ledger import Request, RequestLedger
from data_prep.captions.pricing import Estimate, price_unpriced
from data_prep.captions.run import RunSettings, judge_one, judge_waiting
from data_prep.captions.service import Service, error_message, request_body
from data_prep.errors import UserError
from data_prep.shards.files import writing
from data_prep.shards.format import parse_json

if TYPE_CHECKING:
    from openai.types import Batch

MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000
_ENDED = {"completed", "expired", "cancelled", "failed"}
_NAME = "trilith_batch"
_ADVICE = "see what is wrong there and run again, `captions status` shows what was sent"
_MOST_LISTED = 100_000  # of the service's batches, where ours is looked for by name


@dataclass
class Collected:
    """What `collect` found. open: batches still running; unknown: answers to requests that the ledger does not have."""

    open: int = 0
    ended: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    planned_again: int = 0
    unknown: int = 0
    notes: list[str] = field(default_factory=list)


async def submit(
    ledger: RequestLedger,
    service: Service,
    settings: RunSettings,
    *,
    most_requests: int = MOST_REQUESTS,
    most_bytes: int = MOST_BYTES,
    tick: Callable[[int], None] = lambda requests: None,
) -> tuple[int, int]:
    """Send all planned requests as batches, one model a file; returns (batches, requests).

    Args:
        settings: requests beyond its limit or budget stay planned.
        most_requests, most_bytes: of one file.

    Raises:
        UserError: the service refuses a file or a batch, an image is no longer the one that was planned, or another
            run holds the ledger.
    """
    if most_requests < 1 or most_bytes < 1:
        raise UserError(f"{most_requests} requests and {most_bytes} bytes a file: expected at least 1")
    batches = requests = 0
    with ledger.exclusive():
        if settings.prices:
            price_unpriced(ledger, settings.prices, settings.image_tokens)
        lines = _lines(ledger, settings)
        for model, file, costs in _files(ledger.path, lines, most_requests, most_bytes):
            await _send(ledger, service, model, file, costs)
            batches, requests = batches + 1, requests + len(costs)
            tick(requests)
    return batches, requests


async def collect(
    ledger: RequestLedger, service: Service, settings: RunSettings, *, tick: Callable[[], None] = lambda: None
) -> Collected:
    """Collect the answers of every batch that has ended; what they did not answer is planned again.

    `tick` is called for each answer.
    """
    found = Collected()
    with ledger.exclusive():
        judge_waiting(ledger, settings)
        for row in ledger.db.execute("SELECT * FROM batch WHERE state IN ('open', 'creating') ORDER BY id").fetchall():
            with _translated_errors(service):
                remote = await _remote(service, row)
            if remote is None:
                ledger.db.execute("UPDATE batch SET state = 'lost' WHERE id = ?", (row["id"],))
                found.notes.append(f"batch {row['name']}: the service does not know it; see `captions status`")
                continue
            ledger.db.execute("UPDATE batch SET state = 'open', remote = ? WHERE id = ?", (remote.id, row["id"]))
            if remote.status not in _ENDED:
                found.open += 1
                continue
            try:
                with _translated_errors(service):
                    await _take(ledger, service, row["id"], remote, settings, found, tick)
            except _Refused as error:
                if error.status != 404:
                    raise
                ledger.db.execute("UPDATE batch SET state = 'lost', note = ? WHERE id = ?", (str(error), row["id"]))
                found.notes.append(f"batch {remote.id}: its answers are gone; see `captions status`")
    return found


def _lines(ledger: RequestLedger, settings: RunSettings) -> Iterator[tuple[Request, bytes, float | None]]:
    """(request, its line, its maximal cost) of the planned requests, until budget or limit are reached."""
    prices, reader, estimate = settings.prices, ImageReader(), Estimate(ledger, settings.image_tokens)
    spent, place, taken = ledger.spent(), 0, 0
    while chunk := ledger.planned(256, after=place):
        for place, request in chunk:  # noqa: B007 (the next chunk begins behind it)
            mime, image = reader.of(request)
            most = prices.cost(*estimate.tokens(request, image), batch=True) if prices else None
            if settings.limit is not None and taken >= settings.limit:
                return
            if settings.budget is not None and spent + (most or 0.0) > settings.budget:
                return
            spent, taken = spent + (most or 0.0), taken + 1
            body = request_body(request, mime, image)
            line = {"custom_id": request.id, "method": "POST", "url": "/v1/chat/completions", "body": body}
            yield request, json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n", most


def _files(
    ledger: Path, lines: Iterator[tuple[Request, bytes, float | None]], most_requests: int, most_bytes: int
) -> Iterator[tuple[str, Path, list[tuple[str, float | None]]]]:
    """(model, file, its requests and their maximal costs): files within the limits, each of one model.

    The file is beside the ledger, and is removed when the next one is requested.
    """
    path = ledger.with_name(ledger.name + ".batch.jsonl")
    waiting = next(lines, None)
    while waiting is not None:
        requests: list[tuple[str, float | None]] = []
        model, size = waiting[0].model, 0
        with writing(path):
            file = path.open("wb")
        try:
            while waiting is not None and waiting[0].model == model and len(requests) < most_requests:
                request, line, most = waiting
                if len(line) > most_bytes:
                    raise UserError(f"one request is {len(line)} bytes, a file holds {most_bytes}; use smaller images")
                if size + len(line) > most_bytes:
                    break
                with writing(path):
                    file.write(line)
                size += len(line)
                requests.append((request.id, most))
                waiting = next(lines, None)
            with writing(path):
                file.close()
            yield model, path, requests
        finally:
            with suppress(OSError):  # what did not fit is still in its buffer
                file.close()
            path.unlink(missing_ok=True)


async def _send(
    ledger: RequestLedger, service: Service, model: str, file: Path, requests: list[tuple[str, float | None]]
) -> None:
    """Upload, commit `sent`, create: in this order, so that the ledger knows of everything that is paid for."""
    name = uuid.uuid4().hex
    with _translated_errors(service):
        uploaded = await service.client.files.create(file=file, purpose="batch")
    if not isinstance(getattr(uploaded, "id", None), str):
        raise UserError(f"{service.url} took no file of requests; is it a service with a Batch API?")
    with ledger.transaction() as db:
        number = db.execute(
            "INSERT INTO batch (name, file, created_at, state) VALUES (?, ?, ?, 'creating')",
            (name, uploaded.id, time.time()),
        ).lastrowid
        db.executemany("UPDATE request SET batch = ? WHERE id = ?", [(number, request) for request, _ in requests])
        ledger.sent(requests, now=time.time())
    try:
        with _translated_errors(service):
            created = await service.client.batches.create(
                input_file_id=uploaded.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={_NAME: name, "model": model[:500]},
            )
            remote = _described(service, created)
    except _Refused as error:
        _plan_again(ledger, number, f"refused: {error}")
        ledger.db.execute("UPDATE batch SET state = 'ended', note = ? WHERE id = ?", (str(error), number))
        raise
    ledger.db.execute("UPDATE batch SET state = 'open', remote = ? WHERE id = ?", (remote.id, number))


async def _remote(service: Service, row: sqlite3.Row) -> Batch | None:
    """The service's batch, by its id, or by our name for it if a crash lost the id; None if there is none."""
    if row["remote"]:
        try:
            return _described(service, await service.client.batches.retrieve(row["remote"]))
        except service.openai.NotFoundError:
            return None
    async for remote in _listed(service):
        if isinstance(remote.metadata, dict) and remote.metadata.get(_NAME) == row["name"]:
            return remote
        if remote.created_at < row["created_at"] - 86_400:  # newest first: ours would have been listed by now
            return None
    return None


async def _listed(service: Service) -> AsyncIterator[Batch]:
    """The batches of the service, newest first."""
    count = 0
    try:
        async for remote in service.client.batches.list(limit=100):
            count += 1
            if count > _MOST_LISTED:
                raise UserError(f"{service.url} lists more than {_MOST_LISTED} batches, or has no end; {_ADVICE}")
            yield _described(service, remote)
    except (AttributeError, TypeError) as error:  # of the client, where the answer is no page of a list
        raise UserError(f"{service.url} lists no batches; {_ADVICE}") from error


def _described(service: Service, remote: Batch) -> Batch:
    """`remote` itself, whose fields have their types. UserError if the service described something else.

    The client takes whatever it gets: a page of HTML is a text to it.
    """
    kinds = {"id": str, "status": str, "created_at": int, "output_file_id": str | None, "error_file_id": str | None}
    if not all(isinstance(getattr(remote, name, None), kind) for name, kind in kinds.items()):
        raise UserError(f"{service.url} describes no batch where one was asked for; {_ADVICE}")
    return remote


async def _take(
    ledger: RequestLedger,
    service: Service,
    number: int,
    remote: Batch,
    settings: RunSettings,
    found: Collected,
    tick: Callable[[], None],
) -> None:
    """Match an ended batch's answers to requests by `custom_id`; a request without one was not computed."""
    waiting = _unanswered(ledger, number)
    languages = dict(ledger.db.execute("SELECT id, language FROM request WHERE batch = ?", (number,)).fetchall())
    for file in (remote.output_file_id, remote.error_file_id):
        if file is None:
            continue
        content = await service.client.files.content(file)
        for line in content.content.splitlines():
            if not line.strip():
                continue
            request, status, raw = _answer(line)
            if request is None or request not in languages:
                found.unknown += 1
                continue
            attempt = waiting.get(request)
            if attempt is None or status is None or status in (408, 409, 425, 429) or status >= 500:
                continue  # answered already, or not computed (planned again below)
            del waiting[request]
            raw = service.hide(raw)
            ledger.received(attempt, status, raw, now=time.time())
            verdict, _ = judge_one(ledger, settings, attempt, status, raw, languages[request], batch=True)
            found.accepted += verdict.reason is None
            found.rejected.update([verdict.reason] if verdict.reason else [])
            tick()
    errors = getattr(remote.errors, "data", None)
    message = getattr(errors[0], "message", None) if isinstance(errors, list) and errors else None
    note = f"{remote.status}{f': {message}' if message else ''}"[:300].encode("utf-8", "replace").decode()
    found.planned_again += _plan_again(ledger, number, note)
    if remote.status != "completed":
        found.notes.append(f"batch {remote.id}: {note}")
    ledger.db.execute("UPDATE batch SET state = 'ended', note = ? WHERE id = ?", (note, number))
    found.ended += 1


def _unanswered(ledger: RequestLedger, number: int | None) -> dict[str, int]:
    """Request → its last attempt, of the requests of a batch that have no answer."""
    rows = ledger.db.execute(
        "SELECT request.id, max(attempt.id) FROM request JOIN attempt ON attempt.request = request.id "
        "WHERE batch = ? AND state = 'sent' GROUP BY request.id",
        (number,),
    )
    return dict(rows.fetchall())


def _plan_again(ledger: RequestLedger, number: int | None, note: str) -> int:
    """Plan the unanswered requests of a batch again: they were not computed. Returns how many."""
    attempts = _unanswered(ledger, number).values()
    for attempt in attempts:
        ledger.not_done(attempt, None, f"batch {note}"[:300], now=time.time())
    return len(attempts)


def _answer(line: bytes) -> tuple[str | None, int | None, bytes]:
    """(custom_id, status, body) of a line of an output or error file; status None: not computed."""
    try:
        entry = parse_json(line)
        request, response = entry["custom_id"], entry.get("response")
        if not isinstance(request, str):
            return None, None, b""
        if response is None or entry.get("error"):
            return request, None, b""
        status, raw = response["status_code"], json.dumps(response["body"], ensure_ascii=False)
        if type(status) is not int or not 100 <= status < 1000:
            return None, None, b""
        return request, status, raw.encode("utf-8", "replace")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None, None, b""


class _Refused(UserError):
    """The service refused, so nothing was started."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def _translated_errors(service: Service) -> Iterator[None]:
    """Turn the client's errors into ours, without the API key."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):  # as the client meets them
        raise UserError(f"{service.url} answered with something else than JSON; {_ADVICE}") from None
    except service.openai.APIStatusError as error:
        message = error_message(service.hide(error.response.content))
        if error.status_code >= 500:
            raise UserError(f"{service.url}: status {error.status_code}: {message}; run the command again") from None
        raise _Refused(str(service.stopping_error(error.status_code, message)), error.status_code) from None
    except service.openai.APIConnectionError as error:
        note = service.hide(str(error.__cause__ or error).encode()).decode()
        raise UserError(f"{service.url} cannot be reached ({note}); run the command again") from None
