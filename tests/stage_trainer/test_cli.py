"""`stage-trainer --help` answers at once."""

import resource
import subprocess
import sys

import pytest
from stage_trainer.cli import main

HEAVY = {"torch", "numpy", "yaml", "pydantic", "PIL", "deepspeed", "timm", "transformers", "data_prep"}
COMMANDS = ("train", "plan", "export", "evaluate", "mteb", "report", "search", "demo", "push")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_loads_no_library(command):
    script = (
        "import sys; from stage_trainer.cli import main\n"
        f"try: main({[*command, '--help']!r})\nexcept SystemExit: pass\n"
        f"sys.exit(f'loaded {{found}}' if (found := {HEAVY!r} & set(sys.modules)) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: stage-trainer {' '.join(command)}" in done.stdout


def test_help_takes_less_than_a_fifth_of_a_second():
    """Of the processor, so that other processes of the machine do not count."""

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "stage_trainer.cli", "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.2


def test_control_characters_in_foreign_names_are_escaped(tmp_path, capsys):
    """A terminal would act on them: title, colours, lines overwritten."""
    assert main(["export", str(tmp_path / "a\x1b]0;title\x07\rb"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert r"a\x1b]0;title\x07\x0db" in error
    assert not {"\x1b", "\x07", "\r"} & set(error)
