"""Nothing that was found before fails again, and a short drawn run of each kind finds nothing new."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz import corpus
from fuzz.harness import Child
from fuzz.hunt import Tally, hunt
from fuzz.kinds import KINDS

ENTRIES = {entry.name: entry for entry in corpus.entries()}
WAITING = corpus.waiting()


@pytest.fixture(scope="module")
def child():
    with Child() as process:
        yield process


@pytest.mark.parametrize("name", ENTRIES)
def test_what_was_found_is_used_or_refused_by_name(child, name):
    entry = ENTRIES[name]
    verdict = child.call(entry.kind, entry.files)
    if name in WAITING:
        assert verdict.outcome == "failed", f"{name} holds now: take it off the list (run.py --replay --settle)"
        pytest.xfail(f"not mended yet: {verdict.what}")
    assert verdict.outcome != "failed", f"{verdict.what}\n{verdict.shown}"


@pytest.mark.parametrize("name", KINDS)
def test_valid_input_is_accepted(child, name):
    for files in KINDS[name].valid():
        verdict = child.call(name, files)
        assert verdict.outcome == "accepted", f"{sorted(files)}: {verdict.what}\n{verdict.shown}"


@pytest.mark.parametrize("name", KINDS)
def test_drawn_input_is_used_or_refused_by_name(child, name):
    known = {WAITING[entry] for entry in WAITING if ENTRIES[entry].kind == name}
    expected, tally = set(known), Tally()
    hunt(KINDS[name], child, 20, 0, known, tally)
    new = {what: verdict.shown for what, (_, verdict) in tally.smallest.items() if what not in expected}
    assert not new, "\n".join(f"{what}\n{shown}" for what, shown in new.items())
    assert tally.calls >= 20
