"""A disk that takes no more, met while writing to an open file: one line that says where, and nothing half made."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_prep.captions.batch import _files
from data_prep.cli import main
from data_prep.execute import Spec, process_shard
from data_prep.shards import ShardError, alone, escaped_output

from .conftest import MAKERS, SHOWN, files

PAGES = {
    "inspect": ["inspect", SHOWN, "--out", "OUT"],
    "corpus": ["corpus", "OUT", "--drawn", "120", "--image-size", "16"],
    "plan": ["captions", "plan", "OUT", SHOWN, "--model", "m", "--languages", "en"],
}
COMMANDS = {
    **{name: [*words, "--out", "OUT", "--name", "new"] for name, words in MAKERS.items()},
    **PAGES,
}


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """Files end at `size` bytes: what goes beyond is refused by `write`, which names no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 1500, 6000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_that_names_the_file(place, tmp_path, capsys, command, size):
    out = tmp_path / "out"
    words = [str(out) if word == "OUT" else word for word in COMMANDS[command]]
    capsys.readouterr()
    with full_after(size):
        status = main(words)
    shown = capsys.readouterr()
    published = [name for name in files(tmp_path) if name.endswith("manifest.json") and ".partial" not in name]
    if status == 0:  # it all fitted
        assert size
        return
    assert status == 2
    last = shown.err.splitlines()[-1]
    assert last.startswith("data-prep: ")
    assert str(tmp_path) in last
    assert not published
    assert not [name for name in files(tmp_path) if name.endswith((".tmp", ".html"))]
    assert main(words) == 0  # with room again, it goes on


@pytest.mark.parametrize("size", [100, 1_000_000])
def test_the_requests_of_a_batch_that_do_not_fit_name_their_file_and_leave_none(tmp_path, size):
    """Small ones are refused when the file is closed, large ones while they are written."""
    request = SimpleNamespace(place=1, model="m")
    files_of = _files(tmp_path / "ledger", iter([(request, b"x" * size, None)]), 10, 10**7)
    with full_after(50), pytest.raises(ShardError, match=r"ledger\.batch\.jsonl: cannot be written \(File too large\)"):
        next(files_of)
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_note_does_not_fit_is_held_and_left_all_the_same(tmp_path):
    with full_after(0), alone(tmp_path / ".lock", "it"):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_the_system_refuses_names_its_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(OSError, match="Input/output error") as caught, alone(tmp_path / ".lock", "it"):
        pass
    assert caught.value.filename == str(tmp_path / ".lock")


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_output_that_does_not_fit_says_which(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space") as caught, escaped_output():
        print("text")
    assert caught.value.filename == "standard output"


@pytest.mark.parametrize("target", ["/dev/full", "a closed pipe"])
def test_a_command_whose_output_is_refused_ends_with_one_line(place, target):
    words = [sys.executable, "-c", "import sys; from data_prep.cli import main; sys.exit(main())", "mix", SHOWN]
    if target == "/dev/full":
        with open(target, "w") as out:
            done = subprocess.run(words, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    else:
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writing)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("data-prep: standard output: ")
    assert done.stderr.count("\n") == 1


def read_badly(piece, options, output):
    with open("/proc/self/mem", "rb") as file:  # its first page is not there: an input/output error, without a name
        file.read(1)


def test_a_file_that_cannot_be_read_to_its_end_is_named(tmp_path):
    spec = Spec(f"{__name__}:read_badly", str(tmp_path), 0, {"file": "captions.csv"})
    with pytest.raises(ValueError, match=r"captions\.csv: cannot be read \(Input/output error\)"):
        process_shard(spec)


def test_a_ledger_that_cannot_be_read_now_is_not_called_damaged(place, tmp_path, capsys, monkeypatch):
    ledger = str(tmp_path / "ledger")
    assert main(["captions", "plan", ledger, SHOWN, "--model", "m", "--languages", "en"]) == 0

    def locked(self):
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr("data_prep.captions.ledger.RequestLedger.spent", locked)
    capsys.readouterr()
    assert main(["captions", "status", ledger]) == 2
    assert "cannot be read or written (database is locked)" in capsys.readouterr().err


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 50_000, b"9" * 5000, b"\xff", b"[]", b"5", b'{"shards": 5}', b"{}"])
@pytest.mark.parametrize("name", ["job.json", "publish.json", "receipts/00000.json", "receipt.json", "corpus.json"])
def test_a_damaged_note_of_ours_is_one_line(place, tmp_path, capsys, name, raw):
    words = [*MAKERS["import texts"], "--out", str(tmp_path), "--name", "new"]
    if name == "corpus.json":
        words = ["corpus", str(tmp_path), "--drawn", "120"]
        note = tmp_path / name
    elif name == "receipt.json":
        shutil.copytree(place / "texts", tmp_path / "text-pairs" / "new")
        note = tmp_path / "text-pairs" / "new" / name
    else:
        note = tmp_path / "new.partial" / name
    note.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("receipts"):
        with full_after(300):
            main(words)
    note.write_bytes(raw)
    capsys.readouterr()
    status = main(words)
    error = capsys.readouterr().err
    assert status == 2
    assert Path(note).name in error or str(note.parent) in error or "holds another" in error
    assert error.count("\n") == 1
