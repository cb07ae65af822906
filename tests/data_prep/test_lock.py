"""Of two processes that would write the same, the second is refused; a process that died holds nobody up."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_prep.cli import main
from data_prep.shards import DatasetWriter
from data_prep.shards.lock import InUse, alone

HOLD = """
import sys
from pathlib import Path
from data_prep.shards.lock import alone
with alone(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def hold():
    """Holds a lock file in another process until that ends."""
    processes = []

    def start(path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_lock_is_held_by_one_process_and_goes_with_it_however_it_ends(hold, tmp_path):
    path = tmp_path / "made/lock"
    killed = hold(path)
    with pytest.raises(InUse, match=f"^the thing is in use by process {killed.pid} on .*, since .*; wait until"):
        alone(path, "the thing").__enter__()
    killed.kill()
    killed.wait()
    with alone(path, "the thing"):
        assert f"process {os.getpid()}" in path.read_text()
    assert not path.exists()


def test_a_process_that_was_forked_meanwhile_does_not_keep_a_lock(hold, tmp_path):
    """A loader's worker that outlives its parent must not make the folder look as if a run were alive in it."""
    path = tmp_path / "lock"
    program = HOLD.replace("    print", "    import os; os.fork() or os.execvp('sleep', ['sleep', '1000'])\n    print")
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    (orphan,) = map(int, Path(children).read_text().split())
    process.kill()
    process.wait()
    os.kill(orphan, 0)  # it is alive
    try:
        with alone(path, "the thing"):
            pass
    finally:
        os.kill(orphan, 9)


def test_whoever_waits_goes_on_when_the_other_is_done(hold, tmp_path):
    path = tmp_path / "lock"
    first = hold(path)
    waiting = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace('"it")', '"it", wait=True)'), str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    first.communicate("\n")
    assert waiting.communicate("\n")[0] == "held\n"
    assert not path.exists()


def test_a_file_system_without_locks_is_said_and_stops_nobody(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with alone(tmp_path / "lock", "the thing"):
        pass
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path}: this file system has no locks (No locks available)" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lock", "words"),
    [
        (".corpus.lock", ["corpus", "corpus", "--drawn"]),
        (".n.0-of-1.lock", ["import", "images", "pictures", "--language", "en", "--out", ".", "--name", "n"]),
    ],
)
def test_a_second_command_into_one_place_is_refused_in_one_line(hold, tmp_path, monkeypatch, capsys, lock, words):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "pictures/a.png")
    (tmp_path / "pictures/captions.csv").write_text("image,caption\na.png,black\n")
    process = hold(tmp_path / lock)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"in use by process {process.pid}" in error
    assert error.count("\n") == 1


def test_a_second_writer_of_a_data_set_leaves_the_first_ones_files_alone(hold, tmp_path):
    target = tmp_path / "text-pairs/a"
    hold(target.with_name(".a.lock"))
    (tmp_path / "text-pairs/a.partial").mkdir()
    with pytest.raises(InUse, match="a is being written: it is in use by process"):
        DatasetWriter(target, kind="text-pairs", source="a").__enter__()
    assert (tmp_path / "text-pairs/a.partial").exists()
