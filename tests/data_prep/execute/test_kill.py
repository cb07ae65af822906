"""Killed with SIGKILL at random moments and started again, an import ends with the bytes of an undisturbed one."""

from __future__ import annotations

import random
import subprocess
import time

import pytest
from data_prep.shards import Dataset


def kill_again_and_again(start, files, source, tmp_path, kills: int, seed: int) -> None:
    began = time.monotonic()
    assert start(source, tmp_path / "undisturbed", "--workers", "2").wait() == 0
    lasted = time.monotonic() - began
    moments = random.Random(seed)
    killed = 0
    while killed < kills:  # what comes out is taken away now and then, so that every kill hits a run that has work
        process = start(source, tmp_path / "killed", "--workers", "2")
        try:
            process.wait(moments.uniform(0, 0.5 * lasted))
            (tmp_path / "killed").rename(tmp_path / f"finished-{killed}-{moments.random()}")
        except subprocess.TimeoutExpired:
            process.kill()  # the parent alone: its workers have to end by themselves
            process.wait()
            killed += 1
    last = start(source, tmp_path / "killed", "--workers", "2")
    _, error = last.communicate()
    assert last.returncode == 0, error
    expected = files(tmp_path / "undisturbed")
    assert len(Dataset.open(tmp_path / "killed/image-short/img2dataset", verify=True)) > 0
    for folder in [tmp_path / "killed", *tmp_path.glob("finished-*")]:
        assert files(folder) == expected


def test_killed_three_times_the_bytes_are_those_of_an_undisturbed_run(start, files, downloads, tmp_path):
    kill_again_and_again(start, files, downloads, tmp_path, kills=3, seed=1)


@pytest.mark.full
def test_killed_twenty_times_the_bytes_are_those_of_an_undisturbed_run(start, files, many_downloads, tmp_path):
    kill_again_and_again(start, files, many_downloads, tmp_path, kills=20, seed=2)
