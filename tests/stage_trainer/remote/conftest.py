"""Data under URLs: a server on loopback that misbehaves on purpose and counts what it is asked for."""

import collections
import http.server
import json
import threading
import time
from pathlib import Path

import pytest
from data_prep.shards import DatasetWriter
from stage_trainer.data import download
from stage_trainer.data.remote_data import RemotePlace
from stage_trainer.recipe import RemoteConfig
from stage_trainer.recipe.address import Address

SAMPLES, PER_SHARD, BYTES = 20, 2, 40_000  # ten shards of two samples


@pytest.fixture
def write_data(tmp_path):
    """Writes corpus/train/text-pairs/made, shards of some 80 kB."""

    def execute(samples: int) -> Path:
        directory = tmp_path / "corpus/train/text-pairs/made"
        with DatasetWriter(directory, kind="text-pairs", source="made", samples_per_shard=PER_SHARD) as writer:
            for number in range(samples):
                sides = {side: [{"text": f"{side} {number}", "language": "en"}] for side in ("query", "target")}
                content = json.dumps({**sides, "padding": "x" * BYTES}).encode()
                writer.write(f"s{number}", {"json": content}, languages=["en"], tokens=None)
        return directory

    return execute


@pytest.fixture
def data(write_data) -> Path:
    """Ten of them."""
    return write_data(SAMPLES)


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        faults: what befalls the next requests for a file name, in order; the last one befalls all that follow.
        requests: {file name: number of requests}.
        headers: of each request, with its path.
        ranges: whether ranges of a file are sent, or always the whole.
        sent: bytes of files.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list] = {}
        self.requests: collections.Counter[str] = collections.Counter()
        self.headers: list[tuple[str, dict]] = []
        self.ranges, self.sent = True, 0
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # the client that hangs up is part of the game


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        self.server.requests[name] += 1
        self.server.headers.append((self.path, dict(self.headers)))
        queue = self.server.faults.get(name, [])
        fault = queue.pop(0) if len(queue) > 1 else queue[0] if queue else None
        file = self.server.folder / path.lstrip("/")
        if fault is None and not file.exists():
            fault = 404
        if isinstance(fault, tuple):  # status and further headers
            return self._answer(fault[0], b"", fault[1])
        if isinstance(fault, int):
            return self._answer(fault, b"", {})
        if fault == "hang up":
            return self.connection.close()
        if fault == "silence":
            self.server.released.wait(300)
            return self.connection.close()
        if fault in ("slow bytes", "slow headers"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n" + b"\r\n" * (fault == "slow bytes"))
            while not self.server.released.wait(0.05):
                self.wfile.write(b"x")
            return None
        body = file.read_bytes()
        if self.server.ranges and (span := self.headers.get("Range")):
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            part = body[first : last + 1]
            span = f"bytes {first}-{first + len(part) - 1}/{len(body) + (fault == 'grows' and first > 0)}"
            return self._answer(206, part, {"Content-Range": span}, cut=fault == "cut")
        if fault == "wrong bytes":
            body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
        if fault == "too short":
            body = body[:-50]
        if fault == "too long":
            body += b"x" * 1000
        if fault == "slow":
            time.sleep(0.3)
        self._answer(200, body, {}, cut=fault == "cut", hold=fault == "hold")

    def _answer(self, status, body, headers, cut=False, hold=False):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if cut or hold:
            body = body[: len(body) // 2]
        self.server.sent += len(body)
        self.wfile.write(body)
        if hold:
            self.wfile.flush()
            self.server.released.wait(300)
        if cut or hold:
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Starts a server of a folder, for the length of a test."""
    started = []

    def execute(folder: Path) -> Server:
        started.append(Server(folder))
        return started[-1]

    yield execute
    for server in started:
        server.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(data, serve, tmp_path) -> Server:
    return serve(tmp_path / "corpus")


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been slept between attempts."""
    slept = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    return slept


@pytest.fixture
def opened(server, tmp_path):
    """Opens the data set at the server as a run does."""

    def execute(base=None, **settings):
        options = {"cache": str(tmp_path / "cache"), "timeout": 60, "retries": 4, **settings}
        return RemotePlace(Address(base or server.url, "train/text-pairs/made"), RemoteConfig(**options)).open()

    return execute


@pytest.fixture
def everything():
    """All samples of a data set."""
    return lambda data: [data.read(index) for index in range(len(data))]


@pytest.fixture
def leftovers(tmp_path):
    """The names of what a download would leave behind if it were not whole."""
    return lambda: [p.name for p in (tmp_path / "cache").rglob("*") if p.name.endswith((".part", ".lock"))]


@pytest.fixture
def wait_for():
    """Returns once a condition holds."""

    def execute(condition, seconds=300):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.01)

    return execute
