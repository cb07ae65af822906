"""A process that is forked with its imports behaves as a fresh one."""

import os
import signal
import subprocess
import sys

import forks
import pytest

SAY = """
import os, sys
print(os.getcwd(), sys.argv[1:], os.environ.get("RANK"), "torch" in sys.modules, os.getsid(0) == os.getpid())
print("trouble", file=sys.stderr)
os.write(1, b"at once\\n")
import atexit
atexit.register(print, "at the end")
sys.exit(3)
"""


def test_a_fork_has_words_folder_environment_streams_and_an_end_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("KMP_DUPLICATE_LIB_OK", "True")  # as faiss does when it is imported
    done = forks.run([sys.executable, "-c", SAY, "a", "b c"], tmp_path, RANK="7")
    assert (done.returncode, done.stderr) == (3, "trouble\n")
    assert done.stdout == f"{tmp_path} ['a', 'b c'] 7 True True\nat once\nat the end\n"
    program = tmp_path / "program.py"
    program.write_text("import helper\nprint(__name__, __file__, helper.__name__)\nraise OSError('of its own')\n")
    (tmp_path / "helper.py").write_text("")
    done = forks.run([sys.executable, str(program)], "/")
    assert (done.returncode, done.stdout) == (1, f"__main__ {program} helper\n")
    assert done.stderr.splitlines()[-1] == "OSError: of its own"


def test_what_libraries_have_read_of_the_environment_is_not_changed_under_them(tmp_path):
    done = forks.run([sys.executable, "-c", SAY], tmp_path, HF_HOME=str(tmp_path))
    assert done.stdout.split()[2:4] == ["None", "False"], "a fresh process"


def test_a_fork_is_stopped_killed_and_waited_for_by_its_number(tmp_path):
    with (tmp_path / "log").open("w") as log:
        words = [sys.executable, "-c", "import time; time.sleep(1000)"]
        first, second = (forks.start(words, tmp_path, {}, log, log) for _ in range(2))
    assert isinstance(first, forks.Fork)
    assert os.getpgid(first.pid) == first.pid
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.05)
    os.killpg(first.pid, signal.SIGTERM)
    assert (first.wait(), first.poll(), second.poll()) == (-signal.SIGTERM, -signal.SIGTERM, None)
    second.kill()
    assert second.wait() == -signal.SIGKILL
    first.kill()  # of a process that is gone
