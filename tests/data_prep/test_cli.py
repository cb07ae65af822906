"""The command `data-prep`: quick help, one line for a user's mistake, and light imports."""

from __future__ import annotations

import subprocess
import sys

import pytest
from data_prep.cli import main


def test_drawn_corpus_from_the_command_line_and_again(tmp_path, capsys):
    command = ["corpus", str(tmp_path / "c"), "--drawn", "120", "--image-size", "24"]
    assert main(command) == 0
    assert "image-short/drawn" in capsys.readouterr().out
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--drawn", "7"], "--drawn 7: expected a number from 120"),
        (["--packages", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
    ],
)
def test_a_users_mistake_gives_one_line_and_status_2(tmp_path, capsys, arguments, complaint):
    assert main(["corpus", str(tmp_path / "c"), *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "c.partial").exists()


def test_help_loads_no_library_and_the_shard_format_needs_the_standard_library_alone():
    script = (
        "import sys; from data_prep.cli import main\n"
        "try: main(['corpus', '--help'])\nexcept SystemExit: pass\n"
        "import data_prep.shards\n"
        "heavy = {'PIL', 'numpy', 'sentencepiece', 'webdataset', 'torch', 'resvg_py'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--drawn" in done.stdout
