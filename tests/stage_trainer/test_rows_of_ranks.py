"""Held-out data that the ranks read and embed in parts come together on every rank, in order."""

import hashlib
import io
import json
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
import torch.distributed as dist
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image
from stage_trainer.errors import UserError
from stage_trainer.evaluation.retrieval import Pool, embed, ndcg, score
from vision_tower import ImageError


class Hashing:
    """A model whose towers give any item a vector that follows from its content."""

    class logit_scale:
        device = "cpu"

    def encode(self, items, **options):
        rows = [np.frombuffer(hashlib.sha256(_bytes(item)).digest(), np.uint8) for item in items]
        return np.array(rows, np.float32).reshape(len(items), 32) - 128

    text = vision = property(lambda self: self)


def _bytes(item):
    return item if isinstance(item, bytes) else item.encode()


def write(folder, images):
    """Several files of pages with queries in two languages, of which neighbours share some."""
    with DatasetWriter(folder, kind="image-short", source="drawn", samples_per_shard=5) as writer:
        for number in range(images):
            file = io.BytesIO()
            Image.new("RGB", (16, 12), (9 * number, 90, 200 - number)).save(file, "png")
            captions = [
                {"text": f"{word} {number // 2}", "language": language, "role": "query"}
                for language, word in (("en", "disk"), ("de", "Kreis"))
                if number % 5 or language == "en"
            ]
            members = {"png": file.getvalue(), "json": json.dumps({"captions": captions}).encode()}
            writer.write(f"s{number:02}", members, languages=["en"], tokens=4)


def together(folder, world, *more):
    """What each rank found."""
    (folder / f"meet-{world}").unlink(missing_ok=True)
    processes = [[sys.executable, __file__, str(rank), str(world), str(folder), *more] for rank in range(world)]
    done = forks.together(processes, ".", [{}] * world)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("images", [3, 26])  # of four ranks one has none, or all have about as many
def test_figures_are_equal_at_one_two_and_four_ranks_of_which_each_reads_its_part(tmp_path, images):
    write(tmp_path / "data", images)
    assert images == 3 or len(Dataset.open(tmp_path / "data").shard_sizes) > 4
    (alone,) = together(tmp_path, 1)
    assert alone["read"] == list(range(images))
    for world in (2, 4):
        found = together(tmp_path, world)
        assert [number for each in found for number in each["read"]] == list(range(images))
        assert max(len(each["read"]) for each in found) <= -(-images // world)
        assert len({each["batches"] for each in found}) == 1  # or a rank would wait for the others' signal
        for each in found:
            assert {name: each[name] for name in ("rows", "figures", "images")} == {
                name: alone[name] for name in ("rows", "figures", "images")
            }


@pytest.mark.parametrize("what", ["damaged", "large"])
def test_what_one_rank_cannot_read_is_refused_on_all(tmp_path, what):
    write(tmp_path / "data", 26)
    if what == "damaged":
        data = Dataset.open(tmp_path / "data")
        row, tar = data.row(25), sorted((tmp_path / "data").glob("*.tar"))[-1]
        content = bytearray(tar.read_bytes())
        content[row.members["png"][0] + 40] ^= 1
        tar.write_bytes(content)
    found = together(tmp_path, 2, "100" if what == "large" else "10000")
    words = "'s25' is damaged" if what == "damaged" else "sample s00 is 16x12 pixels, more than the 100 allowed"
    assert all(words in each["refused"] for each in found)


def one_rank(rank, world, folder, max_pixels):
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    reads, real, batches = [], Dataset.read, []
    Dataset.read = lambda self, index: reads.append(index) or real(self, index)
    try:
        pool = Pool.open(folder / "data", max_pixels, (rank, world))
    except (UserError, ImageError) as error:
        return {"refused": str(error)}
    read = list(reads)
    embedded = embed(Hashing(), pool, rank=rank, world=world, before_batch=lambda: batches.append(1))
    assert reads == read  # nothing for embedding
    rows = [hashlib.sha256(each.tobytes()).hexdigest() for each in (embedded.images, embedded.texts)]
    figures = [*score(pool, embedded, [32, 8]), ndcg(pool, embedded, [32, 8]), pool.documents]
    images = [hashlib.sha256(pool.image(number)).hexdigest() for number in range(len(pool))]
    return {"read": read, "rows": rows, "figures": figures, "images": images, "batches": len(batches)}


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.all_gather_object = None  # objects are not gathered
    found = one_rank(rank, world, folder, int(sys.argv[4]) if len(sys.argv) > 4 else 10000)
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))
    if world > 1:
        dist.destroy_process_group()
