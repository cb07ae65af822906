"""Batches travel in pieces: the same batches, in little shared memory."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from data_prep.shards import DatasetWriter
from stage_trainer.data import batches as of_stage
from stage_trainer.data.pieces import BatchesInPieces
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load
from stage_trainer.run import shared_memory
from stage_trainer.run.loader import batches
from stage_trainer.run.shared_memory import pieces_ahead
from stage_trainer.tasks import make_task


@pytest.fixture
def stage(tmp_path, recipes, png):
    """A stage's batches over captioned images, of which some are damaged, and over pairs or triplets."""

    def text(words):
        return [{"text": words, "language": "en"}]

    def execute(of_texts, rank=0, world=1, *more):
        hard = {"negatives": [text("n"), text("other")]} if of_texts == "text-triplets" else {}
        kinds = {"image-short": [], of_texts: []}
        for number in range(40):
            image = b"damaged" if number % 7 == 3 else png
            caption = {"captions": text(f"caption {'x' * number}")}
            kinds["image-short"].append({"png": image, "json": json.dumps(caption).encode()})
            pair = {"query": text("q" * (1 + number)), "target": text("t"), **hard}
            kinds[of_texts].append({"json": json.dumps(pair).encode()})
        for kind, samples in kinds.items():
            if not (folder := tmp_path / "train" / kind / "made").exists():
                with DatasetWriter(folder, kind=kind, source="made", samples_per_shard=9) as writer:
                    for number, members in enumerate(samples):
                        writer.write(f"s{number}", members, languages=["en"], tokens=None)
        overrides = [
            f"corpus={tmp_path}", "batch={image_text: 21, text: 10}", "resolution=[[0, 16]]", "max_tokens=20",
            f"data={{image_text: [{{path: image-short/made}}], text: [{{path: {of_texts}/made}}]}}", *more,
        ]  # fmt: skip
        recipe = load(recipes / "drawn.yaml", overrides, 1).recipe

        def tokenizer(texts, max_length):
            return [[0, *range(3, 3 + len(words)), 2] for words in texts]

        return make_task(recipe, 1).make_batches(tokenizer, rank, world)

    return execute


def content(item):
    batch, drawn = item
    packed = batch.texts
    fields = {**vars(batch), "texts": (packed.ids, packed.cu_seqlens), "max": packed.max_seqlen}
    plain = {n: [p.tolist() for p in v] if isinstance(v, tuple) else v for n, v in fields.items()}
    return {n: v.tolist() if torch.is_tensor(v) else v for n, v in plain.items()}, dataclasses.asdict(drawn)


@pytest.mark.parametrize(
    ("of_texts", "more"),
    [("text-triplets", ()), ("text-pairs", ("loss={kind: unified, dims: [64]}", "model.temperature=0.07"))],
)
def test_a_batch_is_the_same_in_however_many_pieces_and_processes(stage, monkeypatch, of_texts, more):
    data = stage(of_texts, 1, 2, *more)
    assert data.pieces(0) == 1
    whole = [content(data[step]) for step in range(3)]
    assert any(drawn["corrupt"] for _, drawn in whole)
    assert any(drawn["cut"] for _, drawn in whole)
    image = 3 * 16 * 16 * (3 if more else 1)
    for images, pieces in ((1, 10), (3, 4)):
        monkeypatch.setattr(of_stage, "PIECE", images * image + 1)
        assert data.pieces(0) == pieces
        assert [content(data[step]) for step in range(3)] == whole
    items = batches(data, 1, 3, workers=2)
    with contextlib.closing(items):
        assert [content(item) for item in items] == whole[1:]
    sampler = data.image_sampler
    sampler.batch_at = None  # the draws of the last step are kept for all of its pieces
    assert data.piece(2, 0)


def test_no_piece_is_larger_than_said_and_few_are_under_way(stage, monkeypatch):
    data = stage("text-pairs")
    monkeypatch.setattr(of_stage, "PIECE", 5 * 3 * 16 * 16)
    found = [data.piece(0, number).pixels.numel() for number in range(data.pieces(0))]
    assert max(found) <= data.piece_bytes(0) == 5 * 3 * 16 * 16
    assert sum(found) == 21 * 3 * 16 * 16
    ahead = pieces_ahead(data, 0, 4, pytest.fail)
    assert ahead * 4 < (shared_memory.BATCHES_AHEAD + 1) * data.pieces(0)


class Makers(BatchesInPieces):
    """Pieces, cut as the stage cuts them, that hold the process that made them."""

    def __init__(self, stage):
        self.stage = stage

    def pieces(self, step):
        return self.stage.pieces(step)

    def piece(self, step, number):
        return os.getpid()

    def joined(self, step, pieces):
        return list(pieces)


@pytest.mark.parametrize("step", [0, 7])
def test_the_first_batch_of_a_start_or_a_resume_is_the_work_of_all_workers(stage, monkeypatch, step):
    """Small images, too: 36 pixels are decoded from large ones."""
    data = stage("text-pairs", 0, 1, "resolution=[[0, 32]]")
    monkeypatch.setattr(data, "_size", lambda *_: 2048)
    assert data.pieces(step) >= 2048 / of_stage.IMAGES
    items = batches(Makers(data), step, step + 1, workers=3)
    with contextlib.closing(items):
        counts = Counter(next(items))
    assert len(counts) == 3
    assert max(counts.values()) - min(counts.values()) <= 1


class Images(BatchesInPieces):
    """Batches of so many pieces of a megabyte."""

    def __init__(self, count):
        self.count = count

    def pieces(self, step):
        return self.count

    def piece_bytes(self, step):
        return 2**20

    def piece(self, step, number):
        return torch.full((2**20,), step, dtype=torch.uint8)

    def joined(self, step, pieces):
        return [piece.clone() for piece in pieces]


@pytest.mark.parametrize(
    ("free", "expected"),
    [(1000, 10), (8 * 8 * 5 * 1.25, 5), (8 * 8 * 1.25, 1)],
)
def test_what_is_under_way_fits_into_the_shared_memory_of_all_ranks(monkeypatch, free, expected):
    monkeypatch.setattr(shared_memory, "_free", lambda: int(free * 2**20))
    monkeypatch.setenv("LOCAL_SIZE", "8")
    said = []
    assert pieces_ahead(Images(40), 0, 8, said.append) == expected
    assert bool(said) == (expected < 10)
    if said:
        assert "8 workers for each of 8 ranks want 800 MiB to keep 2 batches ahead" in said[0]
        assert "--shm-size" in said[0]


def test_too_little_shared_memory_is_refused_before_the_first_step(monkeypatch):
    """A container's 64 MiB, as a rule."""
    monkeypatch.setattr(shared_memory, "_free", lambda: 64 * 2**20)
    monkeypatch.setenv("LOCAL_SIZE", "8")
    with pytest.raises(UserError, match="has 64 MiB free.*80 MiB at least; give it more.*lower workers .now 8."):
        next(batches(Images(40), 0, 1, workers=8))


PEAK = """
import json, shutil, sys, threading, time
sys.path.insert(0, sys.argv[1])
from test_pieces import Images
from stage_trainer.run.loader import batches
empty, peak = shutil.disk_usage("/dev/shm").used, 0
items = batches(Images(24), 0, 6, workers=2)
for item in items:
    until = time.monotonic() + 1
    while time.monotonic() < until:
        time.sleep(0.005)
        peak = max(peak, shutil.disk_usage("/dev/shm").used - empty)
    assert len(item) == 24
print(peak)
"""


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="Linux")
def test_workers_fill_no_more_than_two_batches_of_shared_memory():
    """Eight batches of 24 MiB were under way before; in a mount of its own, where this user may have one."""
    mounted = ["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=1g tmpfs /dev/shm && exec "$@"', "bash"]
    if subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a /dev/shm of its own")
    words = [*mounted, sys.executable, "-c", PEAK, os.path.dirname(__file__)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    assert 2 * 2**20 <= int(done.stdout) <= (2 * 24 + 2) * 2**20
