"""What a data set of 80,000 shards of 10,000 samples costs until the first batch, beside one shard of the same form.

    python packages/stage-trainer/benchmarks/start.py                       # five minutes, and 700 MB of disk
    python packages/stage-trainer/benchmarks/start.py --before OTHER        # with the code of another checkout, too

The tars are sparse files of 1 GB whose samples are one real picture with a caption; shards have one sidecar, linked to
all of their names. `stage-trainer train` runs as a user runs it, with the drawn recipe's towers and one process that
loads data, and ends at its first batch. Memory is the proportional share (PSS): pages that processes share count once.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import write
from data_prep.shards import Dataset, ShardWriter, write_manifest
from PIL import Image

SIZE = 10**9
LINKS = 30_000  # to a file; ext4 allows 65,000
RECIPE = Path(__file__).parents[3] / "launch/recipes/drawn.yaml"
TRAIN = """
import json, os, sys, time
began = time.perf_counter()
from pathlib import Path
import stage_trainer.trainer as trainer
from stage_trainer.cli import main

def memory(field):
    found = {}
    here = f"/proc/{os.getpid()}/task"
    children = [pid for task in os.listdir(here) for pid in Path(here, task, "children").read_text().split()]
    for pid in (str(os.getpid()), *children):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        found[pid] = sum(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
    return list(found.values())

loaded = trainer.batches
def first(data, *given, **named):
    for batch in loaded(data, *given, **named):
        took = time.perf_counter() - began
        print("FOUND", json.dumps({"seconds": took, "mib": memory("Pss:")}), flush=True)
        os.killpg(0, 9)
trainer.batches = first
main(json.loads(sys.argv[1]))
"""
OPEN = """
import json, sys, time
from data_prep.shards import Dataset
import numpy
whole = Dataset.open(sys.argv[1]) if len(sys.argv) > 2 else None
def private():
    return sum(int(l.split()[1]) for l in open("/proc/self/smaps_rollup") if l.startswith("Private_Dirty")) / 1024
before, began = private(), time.process_time()
late = {"check": False} if "check" in Dataset.open.__kwdefaults__ else {}
data = whole or Dataset.open(sys.argv[1], **late)
if whole: data.row(0)
print("FOUND", json.dumps({"seconds": time.process_time() - began, "mib": private() - before}))
"""


def make(folder: Path, shards: int, samples: int, lines: bool) -> Path:
    """A data set of sparse shards; with `lines` as trilith-shards/1 has it."""
    folder.mkdir(parents=True)
    picture = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(picture, "JPEG")
    text = {"text": "a picture", "language": "en", "origin": "human", "role": "name"}
    members = {"jpg": picture.getvalue(), "json": json.dumps({"captions": [text]}).encode()}
    shard = ShardWriter(folder / "pattern.tar", "image-short")
    shard.write("k", members, languages=["en"], tokens=4)
    entry = shard.finish()
    (row,) = (Dataset.open(_published(folder, [entry])).row(0),)
    head = (folder / "pattern.tar").read_bytes()
    index = _index(row, samples, lines)
    entry |= {"samples": samples, "bytes": SIZE, "index_bytes": len(index)}
    entry["index_sha256"] = hashlib.sha256(index).hexdigest()
    entries = []
    ending = "index.jsonl" if lines else "index.npy"
    for number in range(shards):
        name = f"{number:05d}"
        with (folder / f"{name}.tar").open("wb") as file:
            file.write(head)
            file.truncate(SIZE)
        sidecar = folder / f"{name}.{ending}"
        if number % LINKS:
            os.link(folder / f"{number // LINKS * LINKS:05d}.{ending}", sidecar)
        else:
            sidecar.write_bytes(index)
        entries.append({**entry, "name": f"{name}.tar"})
    (folder / "pattern.tar").unlink()
    (folder / "pattern.index.npy").unlink()
    (folder / "manifest.json").unlink()
    if lines:
        document: dict[str, Any] = {"schema": "trilith-shards/1", "kind": "image-short", "source": "sparse"}
        document |= {"samples": shards * samples, "shards": entries, "tokenizer_sha256": None}
        (folder / "manifest.json").write_text(json.dumps(document, indent=1) + "\n")
    else:
        write_manifest(folder, kind="image-short", source="sparse", shards=entries)
    return folder


def _published(folder: Path, entries: list[dict[str, Any]]) -> Path:
    write_manifest(folder, kind="image-short", source="sparse", shards=entries)
    return folder


def _index(row: Any, samples: int, lines: bool) -> bytes:
    from dataclasses import replace

    from data_prep.shards.sidecar import table_of

    rows = [replace(row, key=f"00000-{number:06d}") for number in range(samples)]
    if not lines:
        return table_of(rows)
    plain = [
        {"key": r.key, "members": r.members, "languages": r.languages, "tokens": r.tokens, "sha256": r.sha256}
        for r in rows
    ]
    return "".join(json.dumps(one, separators=(",", ":")) + "\n" for one in plain).encode()


def found(program: str, arguments: list[str], checkout: Path | None, repeats: int) -> dict[str, Any]:
    """The run whose time is the median."""
    paths = [*(checkout.glob("packages/*/src")), checkout / "data_prep/src"] if checkout else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(repeats):
        words = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, check=False, start_new_session=True
        )
        if "FOUND" not in done.stdout:
            raise SystemExit(done.stdout[-1000:] + done.stderr[-3000:])
        runs.append(json.loads(done.stdout.partition("FOUND")[2]))
    middle: dict[str, Any] = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    return middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=80_000)
    parser.add_argument("--samples", type=int, default=10_000, help="of a shard")
    parser.add_argument("--corpus", default="runs/corpus-drawn", help="the drawn corpus, whose tokenizer is used")
    parser.add_argument("--scratch", default=None, help="where the data sets go (default: the system's)")
    parser.add_argument("--before", type=Path, default=None, metavar="CHECKOUT", help="of the code to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results") / "start.json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        sets = {
            (lines, shards): make(
                Path(scratch, f"{lines}-{shards}", "image-short/sparse"), shards, options.samples, lines
            )
            for lines in (False, True)
            for shards in (1, options.shards)
        }
        ways: dict[str, tuple[bool, Path | None]] = {"tables": (False, None), "lines, as before": (True, None)}
        if options.before:
            ways["lines, by the code before"] = (True, options.before.resolve())
        for name, (lines, checkout) in ways.items():
            run: Callable[..., dict[str, Any]] = lambda program, words, of=checkout: found(  # noqa: E731
                program, words, of, options.repeats
            )
            one, many = (sets[lines, shards] for shards in (1, options.shards))
            results[name] = {
                "first batch, one shard": run(TRAIN, [json.dumps(_words(one, options.corpus, scratch))]),
                "first batch": run(TRAIN, [json.dumps(_words(many, options.corpus, scratch))]),
                "opening": run(OPEN, [str(many)]),
                "a sidecar": run(OPEN, [str(one), "sidecar"]),
            }
            print(name, json.dumps(results[name]), flush=True)
    settings = {"shards": options.shards, "samples of a shard": options.samples, "repeats": options.repeats}
    write(options.results, settings, results)


def _words(data: Path, corpus: str, scratch: str) -> list[str]:
    """`stage-trainer train` on one data set."""
    tokenizer = Path(corpus, "tokenizer.model").resolve()
    values = [f"model.tokenizer={tokenizer}", f"output={scratch}/run", "workers=1", "evaluation={every: 0, pools: []}"]
    stage = [f"data.image_text=[{{path: {data}}}]", "data.text=[]", "batch={image_text: 48}"]
    return ["train", "--recipe", str(RECIPE), "--stage", "1", *values, *stage, "--start-over"]


if __name__ == "__main__":
    main()
