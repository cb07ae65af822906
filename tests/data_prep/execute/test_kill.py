"""Killed with SIGKILL at random moments and started again, a command ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import random
import subprocess
import time

import pytest
from data_prep.shards import Dataset, DatasetWriter

from ..curation.conftest import encoded, photo, text
from ..negatives.test_negatives import WORDS
from ..sources.conftest import write_pdf


def kill_again_and_again(start, files, out, command, kills: int, seed: int) -> None:
    """`command` writes to `out`, which is taken away when it has ended: every kill hits a run that has work."""
    began = time.monotonic()
    process = start(*command)
    _, error = process.communicate()
    assert process.returncode == 0, error
    lasted = time.monotonic() - began
    finished = [out.rename(out.with_name("undisturbed"))]
    moments = random.Random(seed)
    killed = 0
    while killed < kills:
        process = start(*command)
        try:
            process.communicate(timeout=moments.uniform(0, 0.7 * lasted))  # not wait(): a full pipe would hold it
            finished.append(out.rename(out.with_name(f"finished-{len(finished)}")))
        except subprocess.TimeoutExpired:
            process.kill()  # the parent alone: its workers have to end by themselves
            process.wait()
            killed += 1
    process = start(*command)
    _, error = process.communicate()
    assert process.returncode == 0, error
    expected = files(finished[0])
    for manifest in finished[0].rglob("manifest.json"):
        assert len(Dataset.open(manifest.parent, verify=True)) > 0
    for folder in [out, *finished[1:]]:
        assert files(folder) == expected


def img2dataset(downloads, out):
    return ["import", "img2dataset", downloads, "--out", out, "--image-size", 64, "--workers", 2]


def test_killed_three_times_the_bytes_are_those_of_an_undisturbed_run(start, files, downloads, tmp_path):
    out = tmp_path / "out"
    kill_again_and_again(start, files, out, img2dataset(downloads, out), kills=3, seed=1)


@pytest.mark.full
def test_killed_twenty_times_the_bytes_are_those_of_an_undisturbed_run(start, files, many_downloads, tmp_path):
    out = tmp_path / "out"
    kill_again_and_again(start, files, out, img2dataset(many_downloads, out), kills=20, seed=2)


@pytest.fixture
def pairs(tmp_path):
    """Text pairs in forty shards of ten; every fifth nearly repeats the one before, every seventh is the one before."""
    draw = random.Random(3)
    query = target = "red circle"
    with DatasetWriter(tmp_path / "pairs", kind="text-pairs", source="made", samples_per_shard=10) as writer:
        for number in range(1, 401):
            if number % 5 == 1:
                target += "s"
            elif number % 7:
                query = " ".join(draw.choices(WORDS, k=8))
                target = f"{query} {' '.join(draw.choices(WORDS, k=4))}"
            fields = {"query": [text(query)], "target": [text(target)], "source": "made", "item": f"item-{number}"}
            writer.write(f"k{number}", {"json": json.dumps(fields).encode()}, languages=["en"], tokens=None)
    return tmp_path / "pairs"


@pytest.mark.full
def test_a_deduplication_that_is_killed_drops_what_an_undisturbed_one_drops(start, files, pairs, tmp_path):
    out = tmp_path / "out"
    command = ["dedup", pairs, "--out", out, "--name", "clean", "--workers", 2]
    kill_again_and_again(start, files, out, command, kills=20, seed=3)
    assert len(Dataset.open(out / "text-pairs/clean")) < 400


@pytest.mark.full
def test_a_filter_by_similarity_that_is_killed_keeps_what_an_undisturbed_one_keeps(
    start, files, dual_encoder, tmp_path
):
    with DatasetWriter(tmp_path / "photos", kind="image-short", source="made", samples_per_shard=4) as writer:
        for number in range(60):
            fields = {"captions": [text(f"red circle {number}")], "source": "made", "item": f"item-{number}"}
            members = {"png": encoded(photo(number)), "json": json.dumps(fields).encode()}
            writer.write(f"k{number}", members, languages=["en"], tokens=None)
    out = tmp_path / "out"
    command = ["similarity", tmp_path / "photos", "--model", dual_encoder[0], "--top", 0.5, "--out", out]
    kill_again_and_again(start, files, out, [*command, "--name", "fits", "--workers", 2], kills=6, seed=4)
    assert len(Dataset.open(out / "image-short/fits")) == 30


@pytest.mark.full
def test_mining_that_is_killed_finds_the_negatives_of_an_undisturbed_run(start, files, dual_encoder, pairs, tmp_path):
    out = tmp_path / "out"
    command = ["negatives", pairs, "--model", dual_encoder[0], "--ranks", 2, 60, "--margin", 0.001, "--out", out]
    kill_again_and_again(start, files, out, [*command, "--name", "hard", "--workers", 2], kills=6, seed=5)


@pytest.mark.full
def test_an_import_of_pdf_that_is_killed_gives_the_pages_of_an_undisturbed_one(start, files, tmp_path):
    (tmp_path / "reports").mkdir()
    for number in range(200):
        write_pdf(tmp_path / f"reports/{number:03d}.pdf", [f"Report {number}, page {page}" for page in range(3)])
    out = tmp_path / "out"
    command = ["import", "pdf", tmp_path / "reports", "--side", 256, "--out", out, "--workers", 2]
    kill_again_and_again(start, files, out, command, kills=20, seed=6)
    assert len(Dataset.open(out / "image-long/pdf")) == 600
