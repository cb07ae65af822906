"""Work that threads do ahead of its use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")
MOST = 16


def available() -> int:
    """Threads for reading images if nobody says how many: one a core that this process may use, up to sixteen."""
    return min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def ahead(make: Callable[[Given], Made], given: Iterable[Given], threads: int) -> Generator[Made, None, None]:
    """`map(make, given)` in order, where threads make what comes next while the caller is busy; never more than two
    for each thread are waiting. With one thread nothing is made ahead."""
    if threads == 1:
        yield from map(make, given)
        return
    rest = iter(given)
    with ThreadPoolExecutor(threads, thread_name_prefix="images") as pool:
        waiting: deque[Future[Made]] = deque(pool.submit(make, each) for each in islice(rest, 2 * threads))
        try:
            while waiting:
                made = waiting.popleft().result()
                waiting.extend(pool.submit(make, each) for each in islice(rest, 1))
                yield made
        finally:  # the caller has enough, or one could not be made
            pool.shutdown(wait=True, cancel_futures=True)
