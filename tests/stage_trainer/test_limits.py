"""A run that gets no further ends, and says which limit to raise."""

import sys
import time
from pathlib import Path

import forks
import pytest
from stage_trainer.recipe.limits import LimitsConfig
from stage_trainer.recipe.ranges import OF_RECIPE
from stage_trainer.run import limits
from stage_trainer.run.limits import Watch

STUCK = """
import sys, threading
from pathlib import Path
from stage_trainer.recipe.limits import LimitsConfig
from stage_trainer.run.limits import Watch
with Watch(LimitsConfig(step=0.5), Path(sys.argv[1]), interval=0.05) as watch:
    with watch.phase("save"):
        for _ in range(3):
            with watch.phase("step"):
                pass
        print("steps are done", flush=True)
    with watch.phase("step"):
        threading.Event().wait()
"""


def test_a_main_thread_that_is_stuck_ends_its_process_and_names_the_limit(tmp_path):
    done = forks.run([sys.executable, "-c", STUCK, str(tmp_path)], tmp_path)
    assert done.returncode == 1
    assert done.stdout == "steps are done\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("stage-trainer: rank 0 was in one step for more than 0.5 seconds")
    assert "raise limits.step if it was not. The same command goes on from the last checkpoint" in line


def test_two_ranks_of_a_machine_say_it_once(tmp_path):
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    done = forks.together([[sys.executable, "-c", STUCK, str(tmp_path)]] * 2, tmp_path, ranks)
    assert done.returncode == 1
    assert done.stderr.count("limits.step") == 1


class Clock:
    """Of `limits`: a thread that waits makes `now` go on, by what `leaps` says or a second."""

    def __init__(self, *leaps):
        self.now, self.leaps = 0.0, list(leaps)

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        if not self.leaps:
            return True
        self.now += self.leaps.pop(0)
        return False


def watched(monkeypatch, tmp_path, clock, world="1", waits=False, **seconds):
    """The phases in which a watch gives up while the main thread stays in its first step."""
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(limits, "time", clock)
    watch, given_up = Watch(LimitsConfig(**seconds), tmp_path), []
    watch._ended = clock
    monkeypatch.setattr(watch, "_waits", lambda: waits)
    monkeypatch.setattr(watch, "_give_up", lambda name, limit: given_up.append((name, limit, clock.now)))
    with watch.phase("compile"):
        watch._watch()
    return given_up


def test_a_phase_has_its_whole_limit_and_not_more(monkeypatch, tmp_path):
    assert watched(monkeypatch, tmp_path, Clock(*[1] * 10), compile=10) == []
    assert watched(monkeypatch, tmp_path, Clock(*[1] * 11), compile=10) == [("compile", 10, 11)]


def test_what_lasts_is_announced_once_with_its_limit(monkeypatch, tmp_path, capsys):
    assert watched(monkeypatch, tmp_path, Clock(*[1] * 90), compile=100) == []
    assert capsys.readouterr().out == "in its first step for 61 seconds now; limits.compile ends it after 100\n"


def test_a_process_that_was_suspended_is_not_stuck(monkeypatch, tmp_path):
    assert watched(monkeypatch, tmp_path, Clock(1, 5000, 1, 1), compile=10) == []


@pytest.mark.parametrize(
    ("world", "waits", "limit"), [("1", True, 10), ("2", False, 10), ("2", True, 10 + 14 + 5 + 10)]
)
def test_a_rank_that_waits_for_another_one_grants_it_its_batch_and_its_checkpoint(
    monkeypatch, tmp_path, world, waits, limit
):
    found = watched(monkeypatch, tmp_path, Clock(*[1] * (limit + 1)), world, waits, compile=10, batch=7, save=5)
    assert found == [("compile", 10, limit + 1)]


def test_every_limit_has_a_range():
    assert {f"limits.{name}" for name in LimitsConfig.__dataclass_fields__} <= set(OF_RECIPE)
    assert set(limits._DOES) == set(LimitsConfig.__dataclass_fields__)


def train_words(recipes, folder, *settings):
    return ["train", "--recipe", str(recipes / "drawn.yaml"), "--stage", "1", f"output={folder / 'run'}", *settings]


@pytest.fixture
def start_rank(tmp_path):
    """start_rank(number, program, words): one of two ranks, without a launcher; `said` reads what it has said."""
    ranks, running = forks.of_ranks(2), []

    def start(number, program, words):
        log = tmp_path / f"rank-{number}"
        with log.open("w") as file:
            process = forks.start([*program, *words], tmp_path, ranks[number], file, file)
        process.said = log.read_text
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


COMMAND = (str(Path(sys.executable).with_name("stage-trainer")),)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_that_never_comes_or_stops_at_once_ends_the_other(tmp_path, recipes, start_rank, stopped):
    words = train_words(recipes, tmp_path, "limits.start=4")
    if stopped:
        start_rank(1, ("bash", "-c", 'kill -STOP $$; exec "$@"', *COMMAND), (*COMMAND, *words))
    first = start_rank(0, COMMAND, words)
    code, output = first.wait(300), first.said()
    assert code == 1, output
    assert "rank 0 was waiting for all ranks to meet for more than 4 seconds" in output
    assert "raise limits.start" in output.splitlines()[-1]
    assert "Traceback" not in output


LOADING = """
import functools, os, signal, sys, threading
from stage_trainer import trainer
from stage_trainer.cli import main

def load_tokenizer(recipe):
    if os.environ["RANK"] == sys.argv[1]:
        print("stops", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    threading.Event().wait()  # the other one may take long

trainer.Heartbeat = functools.partial(trainer.Heartbeat, silence=4.0, interval=0.4)
trainer.load_tokenizer = load_tokenizer
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.full)])
def test_a_rank_that_stops_while_it_loads_is_missed_by_one_that_may_load_for_long(
    tmp_path, recipes, start_rank, stopped
):
    words = [str(stopped), *train_words(recipes, tmp_path, "limits.load=300")]
    ranks = [start_rank(number, (sys.executable, "-c", LOADING), words) for number in range(2)]
    left = ranks[1 - stopped]
    code, output = left.wait(300), left.said()
    assert "stops\n" in ranks[stopped].said()
    assert code == 1, output
    assert f"rank {1 - stopped} ends: rank {stopped} has given no sign of life for 4 seconds" in output
    assert "limits.load" not in output
    assert "Traceback" not in output


@pytest.mark.full
def test_a_rank_whose_fellow_was_asked_to_leave_while_it_loads_leaves_like_it(tmp_path, recipes, start_rank):
    words = ["no rank", *train_words(recipes, tmp_path, "limits.load=300")]
    loading = LOADING.replace("threading.E", "print('loads', flush=True); threading.E")
    ranks = [start_rank(number, (sys.executable, "-c", loading), words) for number in range(2)]
    while "loads\n" not in ranks[0].said():
        assert ranks[0].poll() is None, ranks[0].said()
        time.sleep(0.02)
    ranks[0].terminate()
    assert [rank.wait(300) for rank in ranks] == [75, 75], [rank.said() for rank in ranks]
    assert "sign of life" not in ranks[1].said()
