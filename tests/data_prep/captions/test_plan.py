"""Plans: written as they go, continued where they were killed, no image decoded; ledgers of an older schema."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.ledger_file import SCHEMA
from data_prep.captions.request import request_id
from data_prep.cli import main
from data_prep.shards import Dataset, DatasetWriter

from .conftest import Reply, good, states
from .test_kills import COMMAND


@pytest.fixture
def images(tmp_path) -> Path:
    """A data set of 1,200 "images" that no decoder would take, a hundred of them again, in one shard."""
    with DatasetWriter(tmp_path / "many", kind="image-short", source="made", samples_per_shard=10_000) as writer:
        for number in range(1300):
            content = json.dumps({"captions": [], "source": "made", "item": f"item-{number}"}).encode()
            writer.write(f"key-{number}", {"jpg": b"no image %d" % (number % 1200), "json": content}, languages=["en"],
                         tokens=None)  # fmt: skip
    return tmp_path / "many"


def requests(ledger):
    with closing(RequestLedger(ledger)) as opened:
        return opened.db.execute(
            "SELECT request.id, image.sha256, dataset, number, language, state FROM request "
            "JOIN image ON image.id = request.image ORDER BY place"
        ).fetchall()


@pytest.mark.parametrize("drawn", [[], ["--images", "900"]])
def test_a_plan_that_is_killed_keeps_what_it_has_and_goes_on_where_it_was(images, tmp_path, drawn, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.captions.plan._AT_A_TIME", 100)
    options = [str(images), "--model", "seer-1", "--languages", "en", "de", *drawn]
    ledger, whole = str(tmp_path / "killed.sqlite"), str(tmp_path / "whole.sqlite")
    read, calls = Dataset.read, []

    class Killed(BaseException):
        pass

    def killed(self, number):
        calls.append(number)
        if len(calls) == 750:
            raise Killed
        return read(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "read", killed)
        with pytest.raises(Killed):
            main(["captions", "plan", ledger, *options])
        assert len(requests(ledger)) == (0 if drawn else 2 * 700)
        calls[:] = [0] * 750  # none is killed any more
        assert main(["captions", "plan", ledger, *options]) == 0
        assert calls[750:] == list(range(700, 1300))  # what was hashed is not read again
        assert main(["captions", "plan", ledger, *options]) == 0
        assert len(calls) == 750 + 600
    capsys.readouterr()
    assert main(["captions", "plan", whole, *options]) == 0
    assert "1200 different images (100 more occurred again)" in capsys.readouterr().out
    assert [tuple(row) for row in requests(ledger)] == [tuple(row) for row in requests(whole)]
    assert len(requests(ledger)) == (1800 if drawn else 2400)


def test_a_plan_whose_process_is_killed_is_finished_by_the_same_command(images, tmp_path):
    ledger = str(tmp_path / "killed.sqlite")
    command = [*COMMAND, "captions", "plan", ledger, str(images), "--model", "m"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
        unready = contextlib.suppress(sqlite3.OperationalError)  # not there yet, or without tables
        with unready, closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db:
            if db.execute("SELECT 1 FROM request LIMIT 1").fetchone():
                break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(requests(ledger)) % 30 == 0
    assert len(requests(ledger)) >= 500 * 30
    assert main(command[len(COMMAND) :]) == 0
    found = requests(ledger)
    assert len({row["id"] for row in found}) == len(found) == 1200 * 30
    digest = hashlib.sha256(b"no image 5").hexdigest()
    options = {"max_tokens": 1024, "detail": None, "body": {}}
    (one,) = [row for row in found if row["sha256"] == digest and row["language"] == "de"]
    assert one["id"] == request_id(digest, "de", "v1", "m", options)


def test_planning_loads_no_decoder(images, tmp_path):
    command = ["captions", "plan", str(tmp_path / "l.sqlite"), str(images), "--model", "m", "--languages", "en"]
    program = f"import sys; from data_prep.cli import main; main({command}); sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, capture_output=True).returncode == 0


def test_progress_is_shown_while_a_plan_is_made(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.execute.progress.LOG_INTERVAL_S", 0.0)
    command = ["captions", "plan", str(tmp_path / "l.sqlite"), str(images), "--model", "m", "--languages", "en"]
    assert main(command) == 0
    assert " 50% 650 of 1300 units" in capsys.readouterr().err


SCHEMA_1 = """
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


def as_schema_1(ledger: str) -> None:
    """Writes a ledger anew, as it was before."""
    old = f"{ledger}.old"
    with closing(sqlite3.connect(old, isolation_level=None)) as db:
        db.executescript(SCHEMA_1)
        db.execute("ATTACH ? AS new", (ledger,))
        for table, columns in (
            ("recipe", "id, model, prompt_version, options"),
            ("prompt", "version, language, sha256, text"),
            ("batch", "id, name, remote, file, created_at, state, note"),
        ):
            db.execute(f"INSERT INTO {table} SELECT {columns} FROM new.{table}")
        db.execute("INSERT INTO image SELECT sha256, dataset, number FROM new.image ORDER BY id")
        db.execute(
            "INSERT INTO request SELECT r.id, i.sha256, language, recipe, batch, caption, reason, s.minima, state "
            "FROM new.request AS r JOIN new.image AS i ON i.id = r.image "
            "LEFT JOIN new.signature AS s ON s.request = r.place ORDER BY place"
        )
        db.execute(
            "INSERT INTO attempt SELECT a.id, r.id, sent_at, ended_at, status, note, raw, model, fingerprint, "
            "prompt_tokens, completion_tokens, cost FROM new.attempt AS a JOIN new.request AS r ON r.place = a.request"
        )
        db.execute("PRAGMA user_version = 1")
    for path in Path(ledger).parent.glob(Path(ledger).name + "-*"):
        path.unlink()
    Path(old).rename(ledger)


def everything(ledger: str) -> dict[str, list[tuple]]:
    with closing(RequestLedger(ledger)) as opened:
        tables = [name for (name,) in opened.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        assert opened.db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA
        return {table: [tuple(row) for row in opened.db.execute(f"SELECT * FROM {table}")] for table in sorted(tables)}


def test_a_ledger_of_the_schema_before_is_brought_up_to_date_and_nothing_is_bought_again(
    seer, planned, run, ledger, tmp_path, capsys
):
    planned(6)
    replies = {1: Reply(drop=True), 3: Reply(body=b"{"), 4: Reply(500, b"no", {"retry-after-ms": "1"})}
    seer.behave = lambda asked: replies.get(asked.number) or good(asked)
    assert run("--limit", "9", "--price-in", "1", "--price-out", "10") == 0
    assert main(["captions", "batch", "submit", ledger, "--url", seer.url, "--limit", "2"]) == 0
    before, found, asked = everything(ledger), states(ledger), len(seer.asked)
    as_schema_1(ledger)
    with RequestLedger(ledger).exclusive():  # the first to open it converts it
        pass
    after = everything(ledger)
    assert after.pop("hashed") == []  # it is filled by the next plan
    del before["hashed"]
    before["request"] = [(*row[:-1], None) for row in before["request"]]  # by which rules it was judged
    assert after == before
    assert states(ledger) == found
    seer.behave = good
    assert run() == 0
    assert len(seer.asked) == asked + found["planned"]
    again = ["--model", "seer-1", "--languages", "en", "--max-tokens", "500"]
    capsys.readouterr()
    assert main(["captions", "plan", ledger, str(tmp_path / "images"), *again]) == 0
    assert "0 requests planned, 6 were in" in capsys.readouterr().out
    assert main(["captions", "export", ledger, str(tmp_path / "long")]) == 0


def test_a_ledger_of_the_schema_before_that_is_in_use_stays_as_it_is(planned, ledger, capsys):
    planned(2)
    new = RequestLedger(ledger)
    lock = new.exclusive()
    as_schema_1(ledger)
    with lock:
        capsys.readouterr()
        assert main(["captions", "status", ledger]) == 2
    assert "in use by another run" in capsys.readouterr().err
    assert main(["captions", "status", ledger]) == 0


@pytest.mark.parametrize("command", ["status", "run", "dry run", "export"])
def test_no_command_reads_a_whole_table_of_requests_or_answers(
    seer, planned, run, ledger, tmp_path, command, monkeypatch
):
    """Captions and raw answers make it gigabytes: what is counted stands in indexes."""
    planned(8)
    assert run("--limit", "12", "--price-in", "1", "--price-out", "1") == 0
    said: list[str] = []
    open_ledger = RequestLedger.__init__

    def traced(self, *arguments, **named):
        open_ledger(self, *arguments, **named)
        self.db.set_trace_callback(said.append)

    with monkeypatch.context() as patch:
        patch.setattr(RequestLedger, "__init__", traced)
        commands = {
            "status": lambda: main(["captions", "status", ledger]),
            "run": lambda: run("--limit", "2", "--price-in", "1", "--price-out", "1"),
            "dry run": lambda: run("--dry-run", "--price-in", "1", "--price-out", "1"),
            "export": lambda: main(["captions", "export", ledger, str(tmp_path / "long")]),
        }
        assert commands[command]() == 0
    with closing(RequestLedger(ledger)) as opened:
        whole = set()
        for statement in {one for one in said if one.lstrip().startswith(("SELECT", "UPDATE", "DELETE"))}:
            for row in opened.db.execute(f"EXPLAIN QUERY PLAN {statement}"):
                if re.fullmatch("SCAN (request|attempt)", row["detail"]):
                    whole.add(statement)
        assert not whole
