"""Scripts that import from `data_prep.shaping`, as curation was called."""

import importlib
import sys

import pytest
from data_prep.curation import language_id, minhash


def test_the_former_name_gives_the_same_modules_and_warns() -> None:
    for name in [name for name in sys.modules if name.startswith("data_prep.shaping")]:
        del sys.modules[name]
    with pytest.warns(DeprecationWarning, match=r"data_prep\.curation"):
        found = importlib.import_module("data_prep.shaping.minhash")
    assert found.matches is minhash.matches
    assert importlib.import_module("data_prep.shaping.languages") is language_id
    assert importlib.import_module("data_prep.shaping").minhash is minhash
