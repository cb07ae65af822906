"""A command and the function behind it are one thing: what is not said means the same in both."""

import importlib
import inspect

import pytest
from data_prep.cli import _parser
from data_prep.execute import Target
from data_prep.negatives import Embedding, Guards

COMMANDS = {
    "split-long": ("curation.split_long:split_long", ["--tokenizer", "x"], {"longest": 256}),
    "dedup": ("curation.dedup:deduplicate", [], {"similarity": 0.8, "distance": 4, "against": []}),
    "languages": ("curation.relabel:relabel", [], {"sure": 0.9}),
    "similarity": ("curation.similarity:filter_by_similarity", ["--model", "x", "--top", "1"], {"dim": None}),
    "negatives": (
        "negatives.mining:mine_negatives", ["--model", "x"],
        {"similarity": 0.8, "exact_up_to": 200_000},
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_and_its_function_have_the_same_defaults(command):
    where, needed, expected = COMMANDS[command]
    module, _, name = where.partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(f"data_prep.{module}"), name)).parameters
    options = _parser().parse_args([command, "shards", "--out", "out", "--name", "name", *needed])
    if embedding := parameters.get("embedding"):
        assert Embedding(model="x").dim == options.dim, embedding
    assert Target("out", "name").samples_per_shard == options.samples_per_shard == 10_000
    for option, value in expected.items():
        default = parameters[option].default
        assert getattr(options, option) == value
        assert (list(default) if isinstance(default, tuple) else default) == value


def test_guards_and_the_command_for_negatives_have_the_same_defaults():
    options = _parser().parse_args(["negatives", "shards", "--out", "out", "--name", "name", "--model", "x"])
    assert Guards(options.count, tuple(options.ranks), options.margin) == Guards() == Guards(7, (10, 200), 0.05)
