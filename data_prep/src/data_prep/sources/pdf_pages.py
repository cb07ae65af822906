"""Pages of PDF files, drawn in a process that is ended where a page takes too much time or memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from data_prep.errors import UserError
from data_prep.shards.format import JsonObject, parse_json

MAX_SIDE = 4096  # pixels of a page's longest side at most, whatever its page box
OUT_OF_MEMORY = 77  # exit status of the process
_PATIENCE = 4  # times as long by the clock as by the processor, on a machine with other work
_START = 120  # seconds


class PdfRefused(ValueError):
    """A PDF or page that cannot be read; the message goes on after "PDF" or "page"."""


class PdfGivenUp(PdfRefused):
    """One that took too much time or memory, or that the library died of."""


class PdfPages:
    """Opens PDF files and draws their pages; a context manager, whose process starts with the first request.

    Args:
        side: pixels of a page's shortest side at least, up to `MAX_SIDE` of its longest.
        seconds: of processor time for a page, or for opening a file; four times as long by the clock.

    Raises (of both methods):
        PdfRefused, PdfGivenUp: see there; the next request is answered by a new process.
        UserError: no process can be started.
    """

    def __init__(self, side: int, seconds: int) -> None:
        self._side, self._seconds = side, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> PdfPages:
        return self

    def __exit__(self, *_: object) -> None:
        self._end(wait=0)

    def count(self, path: Path) -> int:
        """The number of pages of a file."""
        answer, _ = self._ask({"file": str(path)}, refused="that cannot be read")
        return int(answer["pages"])

    def draw(self, path: Path, number: int) -> tuple[bytes, str]:
        """Page `number`, from 0: its PNG and its text, words with single spaces between them."""
        answer, png = self._ask({"file": str(path), "page": number, "side": self._side}, refused="that cannot be drawn")
        return png, str(answer["text"])

    def _ask(self, request: JsonObject, *, refused: str) -> tuple[JsonObject, bytes]:
        connection = self._connection or self._start()
        try:
            connection.send_bytes(json.dumps({**request, "seconds": self._seconds}).encode())
            if not connection.poll(_PATIENCE * self._seconds):
                raise TimeoutError
            answer, image = parse_json(connection.recv_bytes()), connection.recv_bytes()
        except TimeoutError as error:
            self._end(wait=0)
            raise PdfGivenUp(f"given up after {self._seconds} s") from error
        except (EOFError, OSError) as error:  # it has ended
            status = self._end(wait=10)
            if status == -signal.SIGXCPU:
                raise PdfGivenUp(f"given up after {self._seconds} s") from error
            raise PdfGivenUp("that needs too much memory" if status == OUT_OF_MEMORY else refused) from error
        if "refused" in answer:
            raise PdfRefused(answer["refused"] or refused)
        return answer, image

    def _start(self) -> Connection:
        """A new process, which has loaded what it needs."""
        ours, theirs = multiprocessing.Pipe()
        places = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "data_prep.sources.pdf_process", str(theirs.fileno())]
        nothing = subprocess.DEVNULL
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], env=places, stdin=nothing, stdout=nothing, stderr=nothing
                )
            self._connection = ours
            if not ours.poll(_START) or ours.recv_bytes() != b"ready":
                raise EOFError("no answer")
        except (OSError, EOFError) as error:
            status = self._end(wait=0)
            raise UserError(
                f"the process that draws PDF pages does not start ({error}, exit status {status}); free some memory "
                f"and run again, or see what `{' '.join(command[:3])} 0` says"
            ) from error
        return ours

    def _end(self, *, wait: float) -> int | None:
        """End the process, after `wait` seconds if it is ending by itself; returns its exit status."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return None
        try:
            return process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
