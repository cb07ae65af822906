"""The Batch API: the same requests in files, answered within a day at half the price. `collect` gets the answers.

A batch's requests are committed as `sent` before the batch is created, like all requests. After a crash between the two
`collect` finds the batch by the name that the ledger gave it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.captions import faults
from data_prep.captions.images import ImageReader, list_unusable, place_of
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.pricing import Estimate, price_unpriced
from data_prep.captions.request import Request
from data_prep.captions.service import Service, request_body
from data_prep.captions.settings import RunSettings
from data_prep.errors import UserError
from data_prep.shards import ShardError
from data_prep.shards.files import writing

if TYPE_CHECKING:
    from openai.types import Batch

MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000
NAME = "trilith_batch"  # under which the service keeps our name for a batch
_ADVICE = "see what is wrong there and run again, `captions status` shows what was sent"
_UNREADABLE = 20  # images in a row that cannot be read here, before any that can


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
        UserError: the service refuses a file or a batch, or another run holds the ledger; or, when all others are sent,
            a model is unknown, or an image cannot be read or is no longer the one that was planned.
    """
    if most_requests < 1 or most_bytes < 1:
        raise UserError(f"{most_requests} requests and {most_bytes} bytes a file: expected at least 1")
    batches = requests = 0
    unreadable: list[tuple[str, str]] = []
    unknown: dict[str, Refused] = {}
    with ledger.exclusive():
        if settings.prices:
            price_unpriced(ledger, settings.prices, settings.image_tokens)
        lines = _lines(ledger, settings, unreadable)
        for model, file, costs in _files(ledger.path, lines, most_requests, most_bytes):
            if model in unknown:
                continue
            try:
                await _send(ledger, service, model, file, costs)
            except Refused as error:
                if error.status != faults.NO_MODEL:
                    raise
                unknown[model] = error
                continue
            batches, requests = batches + 1, requests + len(costs)
            tick(requests)
    why = [f"those of {model} stay planned: {error}" for model, error in unknown.items()]
    if listed := list_unusable(ledger.path, "batch", dict(unreadable)):
        first = unreadable[0][1]
        why.append(
            f"{len(unreadable)} stay planned, as not all images can be used ({listed} lists them), the first: {first}"
        )
    if why:
        raise UserError(f"{requests} requests were sent in {batches} batches, {'; '.join(why)}")
    return batches, requests


def _lines(
    ledger: RequestLedger, settings: RunSettings, unreadable: list[tuple[str, str]]
) -> Iterator[tuple[Request, bytes, float | None]]:
    """(request, its line, its maximal cost) of the planned requests, until budget or limit are reached.

    The image of a request that is left out, and what is wrong with it, go into `unreadable`.
    """
    prices, reader, estimate = settings.prices, ImageReader(), Estimate(ledger, settings.image_tokens)
    spent, place, taken = ledger.spent(), 0, 0
    while chunk := ledger.planned(256, after=place):
        for request in chunk:
            place = request.place
            try:
                mime, image = reader.of(request)
            except (UserError, ShardError) as error:
                unreadable.append((place_of(request.dataset, request.number), str(error)))
                if not taken and len(unreadable) >= _UNREADABLE:
                    raise
                continue
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
) -> Iterator[tuple[str, Path, list[tuple[int, float | None]]]]:
    """(model, file, its requests and their maximal costs): files within the limits, each of one model.

    The file is beside the ledger, and is removed when the next one is requested.
    """
    path = ledger.with_name(ledger.name + ".batch.jsonl")
    waiting = next(lines, None)
    while waiting is not None:
        requests: list[tuple[int, float | None]] = []
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
                requests.append((request.place, most))
                waiting = next(lines, None)
            with writing(path):
                file.close()
            yield model, path, requests
        finally:
            with suppress(OSError):  # what did not fit is still in its buffer
                file.close()
            path.unlink(missing_ok=True)


async def _send(
    ledger: RequestLedger, service: Service, model: str, file: Path, requests: list[tuple[int, float | None]]
) -> None:
    """Upload, commit `sent`, create: in this order, so that the ledger knows of everything that is paid for."""
    name = uuid.uuid4().hex
    with translated_errors(service):
        uploaded = await service.client.files.create(file=file, purpose="batch")
    if not isinstance(uploaded_id := getattr(uploaded, "id", None), str) or not uploaded_id:
        raise UserError(f"{service.url} took no file of requests; is it a service with a Batch API?")
    with ledger.transaction() as db:
        number = db.execute(
            "INSERT INTO batch (name, file, created_at, state) VALUES (?, ?, ?, 'creating')",
            (name, uploaded_id, time.time()),
        ).lastrowid
        db.executemany("UPDATE request SET batch = ? WHERE place = ?", [(number, request) for request, _ in requests])
        ledger.sent(requests, now=time.time())
    try:
        with translated_errors(service):
            created = await service.client.batches.create(
                input_file_id=uploaded_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={NAME: name, "model": model[:500]},
            )
            remote = described(service, created)
    except Refused as error:
        for attempt in ledger.unanswered(number).values():
            ledger.not_done(attempt, None, f"batch refused: {error}"[:300], now=time.time())
        ledger.db.execute("UPDATE batch SET state = 'ended', note = ? WHERE id = ?", (str(error), number))
        raise
    ledger.db.execute("UPDATE batch SET state = 'open', remote = ? WHERE id = ?", (remote.id, number))


def described(service: Service, remote: Batch) -> Batch:
    """`remote` itself, whose fields have their types. UserError if the service described something else.

    The client takes whatever it gets: a page of HTML is a text to it.
    """
    kinds = {"id": str, "status": str, "created_at": int, "output_file_id": str | None, "error_file_id": str | None}
    if not all(isinstance(getattr(remote, name, None), kind) for name, kind in kinds.items()) or not remote.id:
        raise UserError(f"{service.url} describes no batch where one was asked for; {_ADVICE}")
    return remote


class Refused(UserError):
    """The service refused, so nothing was started; `status`: also what it means, one of `faults.STOPPING`."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def translated_errors(service: Service) -> Iterator[None]:
    """Turn the client's errors into ours, without the API key."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):  # as the client meets them
        raise UserError(f"{service.url} answered with something else than JSON; {_ADVICE}") from None
    except service.openai.APIStatusError as error:
        raw, status = service.hide_in(error.response.content, message=True), error.status_code
        message = faults.error_message(raw)
        if status >= 500:
            raise UserError(f"{service.url}: status {status}: {message}; run the command again") from None
        means = faults.stopping(status, raw)
        raise Refused(str(service.stopping_error(status, message, means or status)), means or status) from None
    except service.openai.APIConnectionError as error:
        note = service.hide(str(error.__cause__ or error))
        raise UserError(f"{service.url} cannot be reached ({note}); run the command again") from None
