"""Draws cases of one kind, makes the calls, and keeps the smallest case of each distinct failure."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field

from fuzz.harness import Child, Files, Kind, Verdict
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Flaky

_SHRINK = 20.0  # seconds for making failing cases smaller


@dataclass
class Tally:
    """What came of some calls. failed: by the failure's `what`; smallest: the smallest case of each,
    with its verdict."""

    calls: int = 0
    accepted: int = 0
    refused: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    smallest: dict[str, tuple[Files, Verdict]] = field(default_factory=dict)

    def add(self, files: Files, verdict: Verdict) -> None:
        """Count a call."""
        self.calls += 1
        self.accepted += verdict.outcome == "accepted"
        self.refused += verdict.outcome == "refused"
        if verdict.outcome == "failed":
            self.failed[verdict.what] += 1
            before = self.smallest.get(verdict.what)
            if before is None or _size(files) < _size(before[0]):
                self.smallest[verdict.what] = files, verdict


class _Found(Exception):
    """A failure; each distinct one has a subclass, which Hypothesis makes smaller on its own."""


def hunt(kind: Kind, child: Child, examples: int, number: int, known: set[str], tally: Tally) -> None:
    """Call `kind` with `examples` cases, drawn by the seed `number`; failures in `known` are counted,
    not made smaller."""
    distinct: dict[str, type[_Found]] = {}
    since = float("inf")

    @seed(number)
    @settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False,
    )  # fmt: skip
    @given(kind.cases())
    def once(files: Files) -> None:
        nonlocal since
        verdict = child.call(kind.name, files)
        tally.add(files, verdict)
        # What takes the whole of a limit is too slow to be made smaller.
        slow = verdict.what.startswith(("memory", "time", "the process"))
        if verdict.outcome != "failed" or verdict.what in known or slow:
            return
        since = min(since, time.monotonic())
        if time.monotonic() - since < _SHRINK:
            raise distinct.setdefault(verdict.what, type("Found", (_Found,), {}))(verdict.what)

    with contextlib.suppress(_Found, ExceptionGroup, Flaky):  # they are in the tally
        once()
    known |= set(tally.smallest)


def _size(files: Files) -> int:
    return sum(map(len, files.values()))
