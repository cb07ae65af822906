"""The command `data-prep`: quick help, one line for a user's mistake, and light imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from data_prep.cli import CONTENTS, main
from data_prep.sources import EVALSETS, SOURCES


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


HEAVY = {"PIL", "numpy", "sentencepiece", "webdataset", "torch", "resvg_py", "pyarrow", "ray", "openai", "faiss"}


@pytest.mark.parametrize(
    "command", [[], ["corpus"], ["import", "images"], ["evalset", "xm3600"], ["inspect"], ["index"]]
)
def test_help_loads_no_library(command):
    script = (
        "import sys; from data_prep.cli import main\n"
        f"try: main({[*command, '--help']!r})\nexcept SystemExit: pass\n"
        "import data_prep.shards\n"
        f"heavy = {HEAVY!r}\n"
        "sys.exit(f'loaded {found}' if (found := heavy & set(sys.modules)) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " ".join(command) in done.stdout


def test_help_is_a_table_of_contents(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for _, modules in CONTENTS:
        assert modules
    for command in ("import", "index", "evalset", "inspect", "validate", "corpus"):
        assert f"\n  {command} " in shown


def test_every_importer_and_evaluation_set_has_an_example_in_the_readme():
    readme = (Path(__file__).parents[2] / "data_prep" / "README.md").read_text(encoding="utf-8")
    for source in SOURCES:
        assert f"data-prep import {source} " in readme
    for evalset in EVALSETS:
        assert f"data-prep evalset {evalset} " in readme


def test_control_characters_in_foreign_names_are_escaped(tmp_path, capsys):
    """A terminal would act on them: title, colours, lines overwritten, in some even keys typed."""
    name = "a\x1b]0;title\x07\x9b31m\rb"
    assert main(["validate", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert r"a\x1b]0;title\x07\x9b31m\x0db" in error
    assert not set(error) & set(map(chr, (*range(10), *range(11, 32), *range(127, 160))))
