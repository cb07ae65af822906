"""The file of a ledger: its tables, how it is opened, and how an older one is brought up to date."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from data_prep.errors import UserError

SCHEMA = 3
# `rules` are those by which a request's answer was judged (`judge.rules`), NULL of versions that did not say.
# `place` is the order in which requests were planned. No index holds the ids, which are hashes: in a file of a million
# rows each new one would go to another page. (image, recipe, language) says the same, in the order of the plan.
_BATCH = """
CREATE TABLE batch (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, remote TEXT, file TEXT, created_at REAL NOT NULL,
    state TEXT NOT NULL, note TEXT);
CREATE TABLE prompt (version TEXT, language TEXT, sha256 TEXT NOT NULL, text TEXT NOT NULL,
    PRIMARY KEY (version, language));
"""
_TABLES = """
CREATE TABLE recipe (id INTEGER PRIMARY KEY, model TEXT NOT NULL, prompt_version TEXT NOT NULL, options TEXT NOT NULL,
    most_tokens INTEGER NOT NULL DEFAULT 0, UNIQUE (model, prompt_version, options));
CREATE TABLE hashed (fingerprint TEXT, start INTEGER, digests BLOB NOT NULL, PRIMARY KEY (fingerprint, start))
    WITHOUT ROWID;
CREATE TABLE image (id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, dataset TEXT NOT NULL,
    number INTEGER NOT NULL);
CREATE TABLE request (place INTEGER PRIMARY KEY, id TEXT NOT NULL, image INTEGER NOT NULL REFERENCES image,
    language TEXT NOT NULL, recipe INTEGER NOT NULL REFERENCES recipe, batch INTEGER REFERENCES batch, reason TEXT,
    signed INTEGER, state TEXT NOT NULL CHECK (state IN ('planned', 'sent', 'received', 'accepted', 'rejected')),
    caption TEXT, rules INTEGER, UNIQUE (image, recipe, language));
CREATE INDEX request_by_state ON request (state, language, reason, rules);
CREATE INDEX request_planned ON request (image) WHERE state = 'planned';
CREATE INDEX request_unsigned ON request (place) WHERE state = 'accepted' AND signed IS NULL;
CREATE INDEX request_by_batch ON request (batch) WHERE batch IS NOT NULL;
CREATE TABLE signature (request INTEGER PRIMARY KEY REFERENCES request, image INTEGER NOT NULL, minima BLOB NOT NULL);
CREATE TABLE attempt (id INTEGER PRIMARY KEY, request INTEGER NOT NULL REFERENCES request, sent_at REAL NOT NULL,
    ended_at REAL, status INTEGER, cost REAL, prompt_tokens INTEGER, completion_tokens INTEGER, model TEXT,
    fingerprint TEXT, note TEXT, raw BLOB);
CREATE INDEX attempt_by_request ON attempt (request, cost, prompt_tokens, completion_tokens);
"""
# Of schema 1, where images and requests were known by their hashes alone.
_FROM_1 = f"""
DROP INDEX request_by_state; DROP INDEX request_unsigned; DROP INDEX request_by_image; DROP INDEX request_by_batch;
DROP INDEX attempt_by_request;
ALTER TABLE recipe RENAME TO recipe_1; ALTER TABLE image RENAME TO image_1;
ALTER TABLE request RENAME TO request_1; ALTER TABLE attempt RENAME TO attempt_1;
{_TABLES}
INSERT INTO recipe SELECT recipe_1.id, recipe_1.model, prompt_version, options, coalesce(max(prompt_tokens), 0)
    FROM recipe_1 LEFT JOIN request_1 ON request_1.recipe = recipe_1.id
    LEFT JOIN attempt_1 ON attempt_1.request = request_1.id GROUP BY recipe_1.id;
INSERT INTO image SELECT rowid, sha256, dataset, number FROM image_1;
INSERT INTO request SELECT request_1.rowid, request_1.id, image.id, language, recipe, batch, reason,
    CASE WHEN signature IS NULL THEN NULL ELSE 1 END, state, caption, NULL
    FROM request_1 JOIN image ON image.sha256 = request_1.image ORDER BY request_1.rowid;
INSERT INTO signature SELECT request_1.rowid, image.id, signature
    FROM request_1 JOIN image ON image.sha256 = request_1.image WHERE signature IS NOT NULL ORDER BY request_1.rowid;
INSERT INTO attempt SELECT attempt_1.id, request_1.rowid, sent_at, ended_at, status, cost, prompt_tokens,
    completion_tokens, model, fingerprint, note, raw
    FROM attempt_1 JOIN request_1 ON request_1.id = attempt_1.request ORDER BY attempt_1.id;
DROP TABLE attempt_1; DROP TABLE request_1; DROP TABLE image_1; DROP TABLE recipe_1;
"""
_FROM_2 = """
ALTER TABLE request ADD COLUMN rules INTEGER;
DROP INDEX request_by_state; CREATE INDEX request_by_state ON request (state, language, reason, rules);
"""
_UPGRADES = {1: _FROM_1, 2: _FROM_2}


def open_ledger(path: Path, *, create: bool) -> sqlite3.Connection:
    """A connection to the ledger at `path`, in which every statement outside of a transaction is one of its own.

    Raises:
        UserError: there is none (without `create`), it is empty, damaged, of another schema or in use by another run
            while its schema has to change, or the disk refuses it.
    """
    if not create and not path.exists():
        raise UserError(f"{path}: no such ledger; make one with `data-prep captions plan {path} SHARDS`")
    if not create and not path.stat().st_size:  # SQLite would make a new one of it, and drop the journal beside it
        raise UserError(f"{path}: is empty; restore it from a copy, or what it had bought is bought again")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if create:
            path.touch()  # with the umask's permissions; SQLite would drop group write
        _check(path)
        db = sqlite3.connect(path, isolation_level=None, timeout=30)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # a commit must survive a power cut: it stands for money
        db.execute("PRAGMA cache_size = -65536")  # 64 MiB
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if not found:
            db.executescript(f"BEGIN; {_BATCH} {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
        elif found in _UPGRADES:
            with locked(path):
                _upgrade(db, _UPGRADES[found])
        elif found != SCHEMA:
            raise UserError(f"{path}: a ledger of schema {found}, expected {SCHEMA}; take another file")
    except (sqlite3.DatabaseError, OSError) as error:
        raise UserError(f"{path}: not a ledger, or the disk refuses it ({error})") from error
    return db


def _check(path: Path) -> None:
    """Find pages that are damaged; one of zeros would read as one without rows, and a run as having nothing to do.

    By a connection that cannot write: another would move the journal into the damaged file, and be rid of it.
    """
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)) as db:
        damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise UserError(f"{path} is damaged ({' '.join(damage.split())}); restore it from a copy")


def _upgrade(db: sqlite3.Connection, statements: str) -> None:
    """Bring an older ledger up to date, all of it or nothing."""
    try:
        db.executescript(f"BEGIN IMMEDIATE; {statements} PRAGMA user_version = {SCHEMA}; COMMIT;")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a ledger against other runs; the system releases the lock when the process ends, however it ends.

    Not `shards.alone`, which goes on where the file system has no locks: here two runs might pay twice.

    Raises:
        UserError: another process holds it, or there are no locks.
    """
    try:
        lock = open(f"{path}.lock", "w")  # noqa: SIM115 (closed below, which is what frees it)
    except OSError as error:
        raise UserError(f"{path}.lock: cannot be written ({error.strerror}); fix it and run again") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path} is in use by another run; wait for it or stop it") from error
        except OSError as error:  # without locks two runs might pay twice
            raise UserError(
                f"{path}: this file system has no locks ({error.strerror}); put the ledger on another one"
            ) from error
        yield
