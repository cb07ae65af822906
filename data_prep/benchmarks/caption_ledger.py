"""A ledger of captions at its full size: what each command takes, in seconds, memory and bytes.

    python data_prep/benchmarks/caption_ledger.py --images 40000 --scratch /big/disk

Pictures of a few bytes in thirty languages, 1.2 million requests: planned, planned again after a kill half way, then
all but a thousand answered with captions of some 1,200 characters, which are exported. Their MinHash signatures are
drawn: a run computes those of its own captions, in a quarter of a millisecond each. The service is a thread on loopback
that answers at once. Seconds are wall-clock with (in brackets) those of the processor; memory is the
peak of the process. Needs 8 GB of disk at full size. Writes `results/caption_ledger.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from common import machine, write
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.plan import Plan
from data_prep.captions.request import Usage
from data_prep.languages import LANGUAGES
from data_prep.shards import DatasetWriter

PROGRAM = """
import os, resource, sys
from data_prep.cli import main
status = main(sys.argv[1:])
print("MEASURED", sum(os.times()[:2]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(status)
"""
COMMAND = [sys.executable, "-c", PROGRAM, "captions"]
LEFT = 1000  # requests that stay planned
SIGNATURE = 280  # bytes of a signature
_CHARACTERS = 1200


def measured(*words: object) -> dict[str, float]:
    """Run `data-prep captions WORDS`."""
    begin = time.perf_counter()
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, check=True)
    wall = time.perf_counter() - begin
    found = re.search(r"MEASURED (\S+) (\d+)", done.stdout)
    assert found is not None
    result = {"seconds": round(wall, 2), "processor_seconds": round(float(found[1]), 2), "peak_bytes": int(found[2])}
    print(f"{words[0]:8} {wall:8.1f} s ({float(found[1]):.1f}) {int(found[2]) / 2**20:8.0f} MiB", flush=True)
    return result


def size(ledger: Path) -> int:
    return sum(path.stat().st_size for path in ledger.parent.glob(ledger.name + "*"))


def killed_half_way(plan: list[object], ledger: Path, requests: int) -> int:
    """Start a plan and kill it when half of the requests are there; returns how many are."""
    process = subprocess.Popen([*COMMAND, *map(str, plan)], stdout=subprocess.DEVNULL)
    count = 0
    while count < requests // 2 and process.poll() is None:
        time.sleep(0.2)
        if ledger.exists() and ledger.stat().st_size:
            with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(ledger)) as db:
                (count,) = db.execute("SELECT count(*) FROM request").fetchone()
    process.send_signal(signal.SIGKILL)
    process.wait()
    return count


class Prose:
    """Captions of words that look like some language's, the same for the same seed."""

    def __init__(self) -> None:
        draw = random.Random(0)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        self.words = ["".join(draw.choices(letters, k=draw.randint(2, 10))) for _ in range(30_000)]

    def caption(self, draw: random.Random) -> str:
        return " ".join(draw.choices(self.words, k=_CHARACTERS // 7))

    def answer(self, text: str) -> bytes:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 900, "completion_tokens": 300, "total_tokens": 1200}
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
        return json.dumps(answer).encode()


def answer_all(ledger: Path, prose: Prose) -> None:
    """Enter an answer to every request but the last thousand, in another order than planned, as a run does."""
    opened, draw = RequestLedger(ledger), random.Random(1)
    opened.db.execute("PRAGMA synchronous = OFF")
    signature = "INSERT INTO signature (minima, request, image) SELECT ?, place, image FROM request WHERE place = ?"
    places = [place for (place,) in opened.db.execute("SELECT place FROM request WHERE state = 'planned'")]
    draw.shuffle(places)
    places = places[LEFT:]
    for start in range(0, len(places), 5000):
        with opened.transaction():
            for place in places[start : start + 5000]:
                (attempt,) = opened.sent([(place, 0.01)], now=1.7e9)
                text = prose.caption(draw)
                opened.received(attempt, 200, prose.answer(text), now=1.7e9)
                opened.judged(attempt, text, None, Usage("m", "fp", 900, 300), 0.005)
                opened.db.execute("UPDATE request SET signed = 1 WHERE place = ?", (place,))
                opened.db.execute(signature, (os.urandom(SIGNATURE), place))
    opened.close()


def service(prose: Prose) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = prose.answer(prose.caption(random.Random()))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def data_set(folder: Path, images: int) -> Path:
    with DatasetWriter(folder / "images", kind="image-short", source="made") as writer:
        for number in range(images):
            content = json.dumps({"captions": [], "source": "made", "item": f"i{number}"}).encode()
            writer.write(f"k{number}", {"jpg": b"picture %d" % number, "json": content}, languages=["en"], tokens=None)
    return folder / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--scratch", help="where data and ledger go (default: the system's)")
    options = parser.parse_args()
    requests, prose, found = options.images * len(LANGUAGES), Prose(), {}
    server = service(prose)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    os.environ["OPENAI_API_KEY"] = "none"
    prices = ("--price-in", 1, "--price-out", 1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        shards, ledger, killed = data_set(folder, options.images), folder / "l.sqlite", folder / "killed.sqlite"
        plan = ["plan", ledger, shards, "--model", "m"]
        found["plan"] = {**measured(*plan), "ledger_bytes": size(ledger)}
        found["plan once more"] = measured(*plan)
        half = killed_half_way(["plan", killed, *plan[2:]], killed, requests)
        found["plan after a kill"] = {**measured("plan", killed, *plan[2:]), "requests_kept": half}
        found["status, all planned"] = measured("status", ledger)
        found["run --limit 200, all planned"] = measured("run", ledger, "--url", url, "--limit", 200, *prices)
        found["run --dry-run, all planned"] = measured("run", ledger, "--url", url, "--dry-run", *prices)
        killed.unlink()
        answer_all(ledger, prose)
        found["status, all answered"] = {**measured("status", ledger), "ledger_bytes": size(ledger)}
        found["run --limit 200, all answered"] = measured("run", ledger, "--url", url, "--limit", 200, *prices)
        found["run --dry-run, all answered"] = measured("run", ledger, "--url", url, "--dry-run", *prices)
        found["export"] = measured("export", ledger, folder / "long")
    server.shutdown()
    settings: dict[str, Any] = {"images": options.images, "languages": len(LANGUAGES), "requests": requests}
    settings |= {"characters": _CHARACTERS, "max_tokens": Plan.max_tokens}
    write("caption_ledger", machine(), settings, found)


if __name__ == "__main__":
    main()
