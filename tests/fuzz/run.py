"""Feeds drawn foreign inputs to everything that reads them, for as long as one likes.

    python tests/fuzz/run.py --minutes 60 --seed 0 [--only tars,recipes] [--out FOLDER]
    python tests/fuzz/run.py --replay [--settle]

Prints calls, accepted, refused and failures by kind of input; each new failure's smallest input is written to --out, by
default the corpus, which the everyday tests replay. Exit status 1 if something new failed. --settle notes which entries
of the corpus fail today (`corpus/waiting.json`): after a mend, its entries leave that list.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fuzz import corpus
from fuzz.harness import Child
from fuzz.hunt import Tally, hunt
from fuzz.kinds import KINDS

_ROUND = 100  # cases of a kind before the next kind's turn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: %(default)s)")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of input, with commas (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=corpus.FOLDER, help="where failing inputs go (default: the corpus)")
    parser.add_argument("--replay", action="store_true", help="the corpus instead of drawn cases")
    parser.add_argument("--settle", action="store_true", help="with --replay: note which entries fail")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(KINDS)):
        parser.error(f"--only {', '.join(unknown)}: expected some of {', '.join(KINDS)}")
    with Child() as child:
        if options.replay:
            return _replay(child, names, options.settle)
        return _run(child, names, options.minutes * 60, options.seed, options.out)


def _run(child: Child, names: list[str], seconds: float, seed: int, out: Path) -> int:
    waiting, entries = corpus.waiting(), {entry.name: entry for entry in corpus.entries()}
    known = {name: {waiting[e] for e in waiting if e in entries and entries[e].kind == name} for name in names}
    tallies = {name: Tally() for name in names}
    written: set[str] = set()
    for name in names:  # or all that follows would test nothing
        for files in KINDS[name].valid():
            if (verdict := child.call(name, files)).outcome != "accepted":
                sys.exit(f"valid {name} are not accepted: {verdict.what}\n{verdict.shown}")
    end, turn = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < end:
            for name in names:
                if time.monotonic() >= end:
                    break
                before = set(known[name])
                hunt(KINDS[name], child, _ROUND, seed * 1_000_003 + turn, known[name], tallies[name])
                for what in sorted(known[name] - before):
                    files, verdict = tallies[name].smallest[what]
                    path = corpus.save(name, files, verdict, out)
                    written.add(path.name)
                    print(f"{name}: {what}\n  {path}\n{verdict.shown}", flush=True)
            turn += 1
    finally:  # also after Ctrl-C
        _print(tallies)
    return 1 if written else 0


def _print(tallies: dict[str, Tally]) -> None:
    print(f"{'kind':<12}{'calls':>9}{'accepted':>10}{'refused':>9}{'failed':>8}")
    for name, tally in tallies.items():
        failed = sum(tally.failed.values())
        print(f"{name:<12}{tally.calls:>9,}{tally.accepted:>10,}{tally.refused:>9,}{failed:>8,}")
        for what, count in tally.failed.most_common():
            print(f"    {count:>6,}  {what}")


def _replay(child: Child, names: list[str], settle: bool) -> int:
    waiting = corpus.waiting()
    failing = dict(waiting)
    wrong = 0
    for entry in corpus.entries():
        if entry.kind not in names:
            continue
        verdict = child.call(entry.kind, entry.files)
        failing.pop(entry.name, None)
        if verdict.outcome == "failed":
            failing[entry.name] = verdict.what
        expected = (verdict.outcome == "failed") == (entry.name in waiting)
        wrong += not expected
        print(
            f"{'' if expected else 'NEW '}{verdict.outcome:<9}{entry.kind:<10} {entry.name}: {verdict.what}", flush=True
        )
    if settle:
        corpus.set_waiting(failing)
    return 0 if settle or not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
