"""Options that nobody can mean, names that become paths, places that cannot be written: one line, and nothing made."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator

import pytest
from data_prep.cli import main
from data_prep.execute import Target
from data_prep.names import check_name
from data_prep.shards import DatasetWriter, ShardError

from data_prep import cli

from .conftest import MAKERS, SHOWN, files

PARSER = cli._parser()
NAMES = ["", " ", ".", "..", "../escaped", "a/b", "/absolute", "a\0b", "x" * 300, "a\x1b[31m", "name\n", "\n", "-x",
         "é", "a\u2028b", "\udcff", "a.partial", "a.survey-b", "a.lock"]  # fmt: skip


def leaves(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list]]:
    """Every command, as its words and its actions."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield words, [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    for action in inner:
        for name, one in action.choices.items():
            yield from leaves(one, (*words, name))


LEAVES = dict(leaves(PARSER))


def bad_values(action: argparse.Action) -> list[str]:
    if action.choices or action.nargs == 0:
        return []
    return {float: ["nan", "inf", "-inf"], int: [str(2**60), str(-(2**53))]}.get(action.type, ["", "  ", "a\0b"])


def filled(action: argparse.Action, value: str | None = None) -> list[str]:
    """The words that give an option or argument this value, or one that parses."""
    usual = next(iter(action.choices)) if action.choices else {int: "1", float: "0.5"}.get(action.type, "x")
    count = action.nargs if isinstance(action.nargs, int) else 1
    values = [usual] * (count - 1) + [usual if value is None else value]
    return [f"{action.option_strings[0]}={values[0]}"] if action.option_strings and count == 1 else [
        *action.option_strings[:1], *values
    ]  # fmt: skip


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_option_of_every_command_refuses_nan_no_end_nothing_and_nul(words, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_parser", lambda: PARSER)
    tried = 0
    for action in LEAVES[words]:
        needed = [one for one in LEAVES[words] if one.required or (one.nargs != "*" and not one.option_strings)]
        if words == ("similarity",) and action.dest not in ("threshold", "top"):
            needed.append(next(one for one in LEAVES[words] if one.dest == "top"))
        rest = [filled(one) for one in needed if one is not action]
        for value in bad_values(action):
            if value.strip() == "" and action.default == "":
                continue  # the same as leaving it out
            options = [*(filled(action, value) if action.option_strings else [])]
            places = [filled(action, value)] if not action.option_strings else []
            named = [word for one in rest if one[0].startswith("-") for word in one]
            ordered = [
                word
                for one in LEAVES[words]
                if not one.option_strings
                for word in (places[0] if one is action else filled(one) if one in needed else [])
            ]
            assert main([*words, *ordered, *named, *options]) == 2, (action.dest, value)
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert error.startswith(f"data-prep: {action.dest.replace('_', '-')} "), (action.dest, value, error)
            tried += 1
    assert tried


@pytest.mark.parametrize("command", MAKERS)
def test_no_name_leaves_its_folder_or_makes_anything_odd(place, capsys, command):
    before = files(place.parent)
    capsys.readouterr()
    for name in NAMES:
        assert main([*MAKERS[command], "--out", "out", f"--name={name}"]) == 2, name
        err = capsys.readouterr().err
        assert err.startswith("data-prep: name ")
        assert err.count("\n") == 1
        assert files(place.parent) == before


@pytest.mark.parametrize("name", NAMES)
def test_the_owner_of_names_refuses_it_and_so_does_whoever_makes_a_target(name):
    for refuse in (lambda: check_name(name, "name"), lambda: Target("out", name)):
        with pytest.raises(ValueError, match="name "):
            refuse()


def test_names_of_prompts_and_sources_are_names(place, capsys):
    for version in NAMES:
        command = ["captions", "plan", "ledger", SHOWN, "--model", "m", "--languages", "en"]
        assert main([*command, f"--prompt-version={version}"]) == 2
        assert "version" in capsys.readouterr().err
    for source in ("", " ", "a\nb", "a\x1b", "\udcff"):  # readers of its manifest would refuse it
        with pytest.raises(ShardError, match="source"):
            DatasetWriter(place / "made", kind="text-pairs", source=source)


@pytest.mark.parametrize("out", [".", "/", "..", "a/.."])
def test_a_folder_to_be_made_has_a_name_of_its_own(tmp_path, capsys, out, monkeypatch):
    (tmp_path / "a" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "empty")
    before = files(tmp_path)
    assert main(["corpus", out, "--drawn", "120", "--image-size", "16"]) == 2
    error = capsys.readouterr().err
    assert "by its own name" in error
    assert error.count("\n") == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize("command", MAKERS)
@pytest.mark.parametrize("out", ["pairs.jsonl/below", "/proc/nothing/here", "x" * 300, "y/" * 3000])
def test_a_place_that_cannot_be_written_is_one_line_and_nothing_is_left(place, capsys, command, out):
    before = files(place)
    capsys.readouterr()
    assert main([*MAKERS[command], "--out", out, "--name", "new"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("data-prep: ")
    assert not [line for line in error if "Traceback" in line]
    assert files(place) == before


@pytest.mark.parametrize("out", ["pairs.jsonl/below", "/proc/nothing/here", "x" * 300, "y/" * 3000])
@pytest.mark.parametrize(
    "command", [["inspect", SHOWN, "--out"], ["corpus", "--drawn", "120", "--image-size", "16"], ["plan"]]
)
def test_pages_corpora_and_ledgers_that_cannot_be_written_are_one_line(place, capsys, command, out):
    if command == ["plan"]:
        command = ["captions", "plan", out, SHOWN, "--model", "m", "--languages", "en"]
    else:
        command = [*command, out]
    before = files(place)
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("data-prep: ")
    assert error.count("\n") == 1
    assert files(place) == before


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["validate", SHOWN, "--show", "-1"], "--show -1"),
        (["validate", SHOWN, "--workers", "0"], "--workers 0"),
        (["inspect", SHOWN, "--look-at", "0"], "--look-at 0"),
        (["inspect", SHOWN, "--examples", "-1"], "--examples -1"),
        (["split-long", SHOWN, "--tokenizer", "t.model", "--longest", "0"], "--longest 0"),
        (["similarity", SHOWN, "--model", "m", "--threshold", "2"], "--threshold 2"),
        (["similarity", SHOWN, "--model", "m", "--top", "0"], "--top 0"),
        (["similarity", SHOWN, "--model", "m", "--top", "0.5", "--dim", "0"], "--dim 0"),
        (["negatives", "texts", "--model", "m", "--dim", "-1"], "--dim -1"),
        (["negatives", "texts", "--model", "m", "--similarity", "0"], "--similarity 0"),
        (["negatives", "texts", "--model", "m", "--exact-up-to", "-1"], "--exact-up-to -1"),
        (["negatives", "texts", "--model", "m", "--count", "0"], "for 0 negatives"),
        (["negatives", "texts", "--model", "m", "--margin", "-1"], "margin -1"),
        (["dedup", "texts", "--similarity", "0"], "--similarity"),
        (["dedup", "texts", "--distance", "16"], "--distance"),
        (["languages", "texts", "--sure", "0"], "--sure 0"),
        (["mix", "texts", "--weights", "0"], "weights"),
        (["import", "texts", "pairs.jsonl", "--negatives", "0"], "--negatives 0"),
        (["import", "texts", "pairs.jsonl", "--negatives", "-3"], "--negatives -3"),
        (["import", "texts", "pairs.jsonl", "--samples-per-shard", "0"], "--samples-per-shard 0"),
        (["import", "texts", "pairs.jsonl", "--task", "1/1"], "task 1/1"),
        (["import", "texts", "pairs.jsonl", "--task", "0/0"], "task 0/0"),
        (["import", "texts", "pairs.jsonl", "--task=-1/2"], "task -1/2"),
        (["import", "texts", "pairs.jsonl", "--task", "1"], "--task 1"),
        (["import", "texts", "pairs.jsonl", "--workers", "-2"], "-2 workers"),
        (["import", "images", "pictures", "--image-size", "0"], "images of 0 pixels"),
        (["import", "images", "pictures", "--image-size", "100000"], "images of 100000 pixels"),
        (["import", "images", "pictures", "--quality", "101"], "quality 101"),
        (["import", "images", "pictures", "--max-pixels", "0"], "at most 0 pixels"),
        (["import", "images", "pictures", "--held-out", "1"], "--held-out 1"),
        (["import", "pdf", "pictures", "--max-pages", "0"], "--max-pages 0"),
        (["import", "pdf", "pictures", "--side", "-1"], "--side -1"),
        (["import", "tatdqa", "pairs.jsonl", "pictures", "--side", "0"], "--side 0"),
        (["corpus", "out", "--drawn", "120", "--image-size", "0"], "image_size 0"),
        (["corpus", "out", "--drawn", "120", "--image-size", "-5"], "image_size -5"),
        (["corpus", "out", "--drawn", "120", "--vocab-size", "0"], "vocab_size 0"),
        (["corpus", "out", "--drawn", "120", "--vocab-size", "-1"], "vocab_size -1"),
        (["corpus", "out", "--drawn", "120", "--workers", "0"], "0 workers"),
        (["corpus", "out", "--drawn", "-1"], "--drawn -1"),
        (["corpus", "out", "--packages", "pictures", "--max-packages", "0"], "max_packages 0"),
        (["captions", "plan", "l", SHOWN, "--model", "m", "--max-tokens", "0"], "max_tokens 0"),
        (["captions", "plan", "l", SHOWN, "--model", "m", "--images", "-1"], "images -1"),
        (["captions", "plan", "l", SHOWN, "--model", "m", "--body", '{"temperature": NaN}'], "cannot be sent"),
        (["captions", "plan", "l", SHOWN, "--model", "m", "--body", '{"stop": "\\ud800"}'], "cannot be sent"),
        (["captions", "plan", "l", SHOWN, "--model", "m", "--body", '{"a":' + "[" * 20000], "is not JSON"),
        (["captions", "plan", "l", SHOWN, "--model", "m", "--body", "9" * 5000], "is not JSON"),
        (["captions", "plan", "l", SHOWN, "--model", "\udcff"], "cannot be sent"),
        (["captions", "plan", "l", SHOWN, "--model", "m", "--languages", "../en"], "unknown language"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_anything_is_made(place, capsys, command, says):
    before = files(place)
    capsys.readouterr()
    own = (
        ["--out", "out"]
        if command[0] in ("import", "split-long", "similarity", "negatives", "dedup", "languages")
        else []
    )
    named = ["--name", "n"] if own else []
    assert main([*command, *own, *named]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert len(error) < 1000
    assert files(place) == before


def test_data_below_a_folder_called_partial_are_found(place, tmp_path):
    shutil.copytree(place / "shards", tmp_path / "all.partial")
    assert main(["validate", str(tmp_path / "all.partial"), "--workers", "1"]) == 0
