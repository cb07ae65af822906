import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
from ports import free_port

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch/recipes/drawn.yaml"

# A shell starts what it runs in the background deaf to SIGINT, and nohup to SIGHUP; children inherit that, and the
# tests send both. What has a handler is the default again in children, so the tests themselves stay under nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(scope="session")
def drawn_corpus(tmp_path_factory) -> Path:
    """The drawn corpus, as `data-prep corpus --drawn` makes it."""
    out = tmp_path_factory.mktemp("drawn") / "corpus"
    subprocess.run([command("data-prep"), "corpus", str(out), "--drawn"], check=True, capture_output=True)
    return out


def command(name: str) -> str:
    found = Path(sys.executable).with_name(name)
    assert found.exists(), f"{found} is missing; is the package installed in this environment?"
    return str(found)


@pytest.fixture
def run(tmp_path: Path, drawn_corpus: Path):
    """Runs a console command in an empty directory, `{corpus}` in its arguments being the drawn corpus."""

    def execute(*arguments: object, fails: bool = False, limit: str = "", env: dict[str, str] | None = None):
        words = [str(a).replace("{corpus}", str(drawn_corpus)) for a in arguments]
        words[0] = words[0] if os.sep in words[0] else command(words[0])
        if limit:
            words = ["bash", "-c", f'{limit}; exec "$@"', "bash", *words]
        done = forks.run(words, tmp_path, **env or {})
        assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return execute


def arguments(
    corpus: Path, stage: int, settings: tuple[str, ...], output: str, ranks: int = 1, recipe: Path = RECIPE
) -> list[str]:
    head = [command("stage-trainer"), "train", "--stage", str(stage)]
    if ranks > 1:
        head = [*launched(ranks), str(ROOT / f"launch/stage{stage}.sh")]
    here = [f"output={output}", f"corpus={corpus}", f"model.tokenizer={corpus}/tokenizer.model"]
    return [*head, "--recipe", str(recipe), *here, *settings]


def launched(ranks: int) -> list[str]:
    return [command("deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port())]


@pytest.fixture
def train(run, tmp_path: Path, drawn_corpus: Path):
    """Trains a stage on the drawn corpus: train(1, "steps=4", ranks=2); with `launcher` through its launch file."""

    def execute(
        stage: int, *settings: str, ranks: int = 1, output: str = "run", recipe: Path = RECIPE, launcher: bool = False,
        **options,
    ):  # fmt: skip
        words = arguments(drawn_corpus, stage, settings, output, ranks if launcher else 1, recipe)
        if launcher or ranks == 1:
            return run(*words, **options)
        done = forks.together([words] * ranks, tmp_path, forks.of_ranks(ranks))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    execute.recipe = RECIPE
    return execute


@pytest.fixture
def start(tmp_path: Path, drawn_corpus: Path):
    """Starts what `train` would run and returns the process."""

    def execute(stage: int, *settings: str, output: str = "run", recipe: Path = RECIPE):
        return started(arguments(drawn_corpus, stage, settings, output, recipe=recipe), tmp_path)

    return execute


def started(words: list[str], folder: Path, **environment: str) -> forks.Process:
    """A process in a session of its own; what it says goes to a file, as a pipe that nobody reads would fill up and
    hold it, and can be read from `stdout` (both streams)."""
    log = folder / f"log-{len(list(folder.glob('log-*')))}"
    with log.open("w") as file:
        begun = forks.start(words, folder, environment, file, file)
    begun.stdout = log.open(errors="replace")
    return begun


def until(condition, process: forks.Process):
    """Waits for something that a process does while it lives; gives it."""
    while not (found := condition()):
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.02)
    return found


@pytest.fixture
def launcher(drawn_corpus: Path):
    """The command that runs a launch file under `deepspeed` with several ranks, on the drawn corpus."""

    def words(script: Path, ranks: int, *settings: str, output: str = "run") -> list[str]:
        here = [f"output={output}", f"corpus={drawn_corpus}", f"model.tokenizer={drawn_corpus}/tokenizer.model"]
        return [*launched(ranks), str(script), "--recipe", str(RECIPE), *here, *settings]

    return words


@pytest.fixture
def port() -> str:
    return str(free_port())


@pytest.fixture
def scalars(tmp_path: Path):
    """{step: value} of a scalar in a stage's TensorBoard files, or the names of all scalars."""

    def read(stage_directory: str, tag: str | None = None):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / stage_directory), size_guidance={"scalars": 0})
        events.Reload()
        if tag is None:
            return set(events.Tags()["scalars"])
        return {e.step: e.value for e in events.Scalars(tag)}

    return read


@pytest.fixture
def copy_of_corpus(tmp_path: Path, drawn_corpus: Path) -> Path:
    """A corpus that a test may damage."""
    return Path(shutil.copytree(drawn_corpus, tmp_path / "damaged"))
