"""Python looks for garbage less often, and not among what imports have made.

By itself it goes through all objects again and again while the libraries are imported and the tests are collected, a
fifth of that time, and once more whenever a test has made many.
"""

import gc

import pytest

ALLOCATIONS = 10_000
"""More objects than were freed, after which Python looks through the newest: 700 by itself."""


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(ALLOCATIONS)
        gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # or Triton complains, at the end, of what is not freed
