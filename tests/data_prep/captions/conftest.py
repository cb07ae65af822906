"""Fixtures: a vision service on loopback that counts what it is asked and misbehaves on demand; images to describe."""

from __future__ import annotations

import contextlib
import email.parser
import hashlib
import io
import json
import random
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.texts import PROMPTS
from data_prep.cli import main
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image

LANGUAGES = ("en", "de", "fr")
KEY = "sk-test-0123456789abcdef-do-not-show"
WORDS = {
    "en": "the a small red house stands behind two tall green trees while an old man walks slowly along the river with "
    "his brown dog and looks at white boats under grey clouds near quiet hills where children play in warm light",
    "de": "das ein kleines rotes Haus steht hinter zwei hohen grünen Bäumen während ein alter Mann langsam am Fluss "
    "mit seinem braunen Hund geht und weiße Boote unter grauen Wolken nahe stillen Hügeln sieht wo Kinder spielen",
    "no": "et lite rødt hus står bak høye grønne trær mens en gammel mann går sakte langs elva sammen med den brune "
    "hunden sin og ser på hvite båter under grå skyer ved rolige åser hvor noen barn leker i det varme lyset nå",
    "da": "et lille rødt hus står bag to høje grønne træer mens en gammel mand langsomt går langs åen sammen med sin "
    "brune hund og kigger på hvide både under grå skyer ved rolige bakker hvor nogle børn leger i det varme lys nu",
    "fr": "une petite maison rouge se trouve derrière deux grands arbres verts tandis que le vieil homme marche "
    "avec son chien brun et regarde des bateaux blancs sous les nuages gris près des collines où jouent les enfants",
}


def caption(language: str, seed: str, words: int = 60) -> str:
    """Prose of a sort, in a language, of some 300 characters, different for each seed."""
    bank = WORDS[language].split()
    draw = random.Random(f"{language}{seed}")
    return " ".join(draw.choice(bank) for _ in range(words)).capitalize() + "."


def completion(text: str | None, *, finish: str = "stop", refusal: str | None = None) -> dict:
    """The JSON of an answer."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "seer-1-2026-01-01",
        "system_fingerprint": "fp_7",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text, "refusal": refusal}, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 900, "completion_tokens": 100, "total_tokens": 1000},
    }


@dataclass
class Reply:
    """How the service reacts; `drop`: it computes and then breaks the connection; `wire`: it writes these bytes, one
    part after another, each `pause` seconds after the one before, until the client has gone.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    drop: bool = False
    wire: Iterable[bytes] = ()
    pause: float = 0.0


def good(asked: Asked) -> Reply:
    return Reply(body=json.dumps(completion(caption(asked.language, asked.image))).encode())


@dataclass(frozen=True)
class Asked:
    """A request as the service saw it: its number from 0, how often this very one came before, what it wants."""

    number: int
    before: int
    language: str
    image: str
    body: dict


class SeerService(ThreadingHTTPServer):
    """`asked`: what came, in order; `computed`: how often each (image, language) was answered, that is, paid for;
    `paths`: of all calls. `authorization`: what it lets in; `pages`: gives the n-th answer to who asks for the list of
    batches, if they are not all on one page.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.behave: Callable[[Asked], Reply] = good
        self.asked: list[Asked] = []
        self.times: list[float] = []
        self.computed: Counter[tuple[str, str]] = Counter()
        self.under_way = self.most_under_way = self.connections = 0
        self.authorization = f"Bearer {KEY}"
        self.paths: list[str] = []
        self.pages: Callable[[int], dict] | None = None
        self.odd: dict[str, bytes] = {}  # path -> an answer of 200 that is not what was asked for
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.created = 0
        self.unknown: set[str] = set()  # models of which it takes no batch
        self.lock = threading.Lock()
        self.languages = {path.read_text().strip(): path.stem for path in (PROMPTS / "v1").glob("*.txt")}

    def note(self, body: dict) -> Asked:
        prompt, image = (part for part in body["messages"][0]["content"])
        language = self.languages[prompt["text"]]
        digest = hashlib.sha256(image["image_url"]["url"].encode()).hexdigest()
        with self.lock:
            before = sum((one.image, one.language) == (digest, language) for one in self.asked)
            self.asked.append(Asked(len(self.asked), before, language, digest, body))
            self.times.append(time.time())
            return self.asked[-1]

    def process_request(self, *of_it: object) -> None:
        with self.lock:
            self.connections += 1
        super().process_request(*of_it)

    def process_request_thread(self, *of_it: object) -> None:
        super().process_request_thread(*of_it)
        with self.lock:
            self.connections -= 1

    def settle(self) -> None:
        """Waits until everything is answered that was asked for by processes that are gone."""
        with socket.create_connection(self.server_address) as last:  # those before it are accepted before it
            last.sendall(b"GET /v1/batches HTTP/1.0\r\n\r\n")
            last.recv(1)
        while self.connections:
            time.sleep(0.01)

    def handle_error(self, *_: object) -> None:
        """A client that was killed has broken its connection; that is no fault of the service."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SeerService

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.route()
        if self.path in self.server.odd:
            self.answer(200, self.server.odd[self.path])
        elif self.headers["Authorization"] != self.server.authorization:
            sent = {name: value for name, value in self.headers.items() if "uthorization" in name}
            message = f"Incorrect API key provided: {sent} for {self.server.paths[-1]}"
            self.answer(401, json.dumps({"error": {"message": message, "code": "invalid_api_key"}}).encode())
            with self.server.lock:
                self.server.asked.append(Asked(len(self.server.asked), 0, "", "", {}))
        elif self.path == "/v1/chat/completions":
            self.complete(self.server.note(json.loads(data)))
        elif self.path == "/v1/files":
            name = f"file-{len(self.server.files)}"
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts = email.parser.BytesParser().parsebytes(head + data).get_payload()
            (uploaded,) = (part.get_payload(decode=True) for part in parts if part.get_filename())
            self.server.files[name] = uploaded
            self.answer(200, json.dumps({"id": name, "object": "file", "purpose": "batch", "bytes": 1}).encode())
        elif self.path == "/v1/batches":
            wanted = json.loads(data)
            if (model := wanted["metadata"]["model"]) in self.server.unknown:
                error = {"message": f"The model `{model}` does not exist", "code": "model_not_found"}
                self.answer(404, json.dumps({"error": error}).encode())
                return
            self.server.created += 1
            batch = {
                "id": f"batch_{self.server.created}",
                "object": "batch",
                "status": "validating",
                "created_at": int(time.time()),
                **wanted,
            }
            self.server.batches[batch["id"]] = batch
            self.answer(200, json.dumps(batch).encode())

    def route(self) -> None:
        """Note the path, and route by it without what follows a question mark."""
        self.server.paths.append(self.path)
        self.path = self.path.partition("?")[0]

    def do_GET(self) -> None:
        self.route()
        if (found := next((path for path in self.server.odd if self.path.startswith(path)), None)) is not None:
            self.answer(200, self.server.odd[found])
        elif self.path.startswith("/v1/batches/"):
            batch = self.server.batches.get(self.path.split("/")[-1])
            self.answer(200 if batch else 404, json.dumps(batch).encode())
        elif self.path.startswith("/v1/batches") and self.server.pages:
            number = sum("/v1/batches?" in path for path in self.server.paths) - 1
            self.answer(200, json.dumps(self.server.pages(number)).encode())
        elif self.path.startswith("/v1/batches"):
            newest = list(self.server.batches.values())[::-1]
            self.answer(200, json.dumps({"object": "list", "data": newest, "has_more": False}).encode())
        else:
            (name,) = re.findall("/v1/files/(.*)/content", self.path)
            if name in self.server.files:
                self.answer(200, self.server.files[name])
            else:
                self.answer(404, b'{"error": {"message": "No such File object"}}')

    def complete(self, asked: Asked) -> None:
        server = self.server
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        reply = server.behave(asked)
        time.sleep(reply.seconds)
        with server.lock:
            server.under_way -= 1
            if reply.status == 200:
                server.computed[asked.image, asked.language] += 1
        if reply.wire:
            self.write(reply)
        elif reply.drop:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.answer(reply.status, reply.body, reply.headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        own = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in {**own, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def write(self, reply: Reply) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            for part in reply.wire:
                self.wfile.write(part)
                time.sleep(reply.pause)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def seer(monkeypatch: pytest.MonkeyPatch) -> Iterator[SeerService]:
    """A running service; the key for it is in OPENAI_API_KEY."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with SeerService() as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data set of `count` different pictures, named `item-N`; `again` of them a second time."""

    def make(count: int, *, again: int = 0, name: str = "images") -> Path:
        with DatasetWriter(tmp_path / name, kind="image-short", source="made", samples_per_shard=4) as writer:
            for number in [*range(count), *range(again)]:
                buffer = io.BytesIO()
                Image.new("RGB", (40, 30), (number * 7 % 256, number % 256, 90)).save(buffer, "PNG")
                fields = json.dumps({"captions": [], "source": "made", "item": f"item-{number}"}).encode()
                key = f"key-{number}" if not (tmp_path / f"seen-{number}").exists() else f"key-{number}-again"
                (tmp_path / f"seen-{number}").touch()
                writer.write(key, {"png": buffer.getvalue(), "json": fields}, languages=["en"], tokens=None)
        for number in range(count):
            (tmp_path / f"seen-{number}").unlink()
        return tmp_path / name

    return make


def build_backwards(directory: Path) -> None:
    """Writes a data set of images again, its samples in the opposite order."""
    old = Dataset.open(directory)
    samples = [(old.row(number).key, old.read(number)) for number in reversed(range(len(old)))]
    shutil.rmtree(directory)
    with DatasetWriter(directory, kind=old.kind, source="made", samples_per_shard=4) as writer:
        for key, members in samples:
            writer.write(key, members, languages=["en"], tokens=None)


@pytest.fixture
def ledger(tmp_path):
    return str(tmp_path / "ledger.sqlite")


@pytest.fixture
def planned(make_images, ledger):
    """Plans captions of `count` images; gives how many requests that makes."""

    def plan(count, languages=LANGUAGES, **images):
        shards = make_images(count, **images)
        command = ["captions", "plan", ledger, str(shards), "--model", "seer-1", "--languages", *languages]
        assert main([*command, "--max-tokens", "500"]) == 0
        return count * len(languages)

    return plan


@pytest.fixture
def run(seer, ledger):
    def run(*options):
        return main(["captions", "run", ledger, "--url", seer.url, *options])

    return run


@pytest.fixture
def batches(seer, make_images, tmp_path):
    """A ledger with six requests planned, and the two commands on it."""
    ledger = str(tmp_path / "ledger.sqlite")
    shards = str(make_images(3))
    assert main(["captions", "plan", ledger, shards, "--model", "seer-1", "--languages", "en", "de"]) == 0

    def command(step, *options):
        return main(["captions", "batch", step, ledger, "--url", seer.url, *options])

    command.ledger = ledger
    return command


def states(ledger):
    rows = RequestLedger(ledger).db.execute("SELECT state, coalesce(reason, ''), count(*) FROM request GROUP BY 1, 2")
    return {f"{state}{':' + reason if reason else ''}": count for state, reason, count in rows}
