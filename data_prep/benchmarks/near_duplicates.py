"""Near-duplicates among synthetic texts and image hashes: ours, and datasketch's MinHash LSH on as many as it can do.

    python data_prep/benchmarks/near_duplicates.py --texts 1000000

Texts are of some 100 characters, from a vocabulary with Zipf's distribution; every tenth is another one with one word
changed. Both look for those alike to 0.8, in one process and one thread: datasketch by its estimate, ours by the exact
Jaccard similarity of what its estimate finds, with signatures on the disk, as `data-prep dedup` does. Recall is of what
was planted (ours: where the text that it was made from stays). Seconds are those of the processor, so that a busy
machine does not blur them. Writes `results/near_duplicates.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, write
from data_prep.curation.minhash import near_duplicates, normalize_text, signatures
from data_prep.curation.passes import save
from data_prep.curation.phash import pairs_within
from data_prep.curation.signature_store import SignatureStore, arrays_of

SIMILARITY = 0.8
_AT_A_TIME = 2000


def texts(count: int) -> Iterator[tuple[list[str], list[int]]]:
    """Parts of the texts, and of each text the number of the one that it was made from (its own if from none)."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = np.array(["".join(draw.choice(letters, draw.integers(2, 10))) for _ in range(30_000)])
    weights = 1 / np.arange(10, len(words) + 10)
    weights /= weights.sum()
    for start in range(0, count, _AT_A_TIME):
        lines: list[list[str]] = []
        origins: list[int] = []
        drawn = draw.choice(words, (min(_AT_A_TIME, count - start), 25), p=weights)
        for place, row in enumerate(drawn):
            origin = place
            if place % 10 == 9:
                origin = int(draw.integers(0, place // 10 * 10 + 9))
                row = lines[origin].copy()
                row[draw.integers(0, len(row))] = draw.choice(words)
            else:
                row = list(row[: draw.integers(8, 26)])
            lines.append(row)
            origins.append(start + origin)
        yield [" ".join(line) for line in lines], origins


def jaccard(one: str, two: str) -> float:
    sets = [
        {text[place : place + 5] for place in range(len(text) - 4)}
        for text in (normalize_text(one), normalize_text(two))
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def ours(count: int) -> dict[str, float]:
    signing, files = 0.0, []
    planted: list[tuple[int, int, float]] = []
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (part, origins) in enumerate(texts(count)):
            files.append(Path(folder) / f"{number}.npz")
            start = time.process_time()
            save(files[-1], **arrays_of("whole", signatures(part)))
            signing += time.process_time() - start
            planted += alike(number * _AT_A_TIME, part, origins)
            lines += part
        before, start = peak_memory(), time.process_time()
        with SignatureStore(files, "whole") as stored:
            group = near_duplicates(stored, similarity=SIMILARITY, text_of=lines.__getitem__)
        grouping, after = time.process_time() - start, peak_memory()
    return {
        "texts": count,
        "signing_seconds": signing,
        "grouping_seconds": grouping,
        "texts_per_second": count / (signing + grouping),
        "removed": int((group != np.arange(count)).sum()),
        "peak_memory_mib": after / 2**20,
        "grouping_adds_bytes_a_text": (after - before) / count,
        **recalls([(similar, group[later] != later) for later, origin, similar in planted if group[origin] == origin]),
    }


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def datasketch(count: int) -> dict[str, float]:
    from datasketch import MinHash, MinHashLSH

    seconds, found = 0.0, []
    sketches: list[MinHash] = []
    index = MinHashLSH(threshold=SIMILARITY, num_perm=120, params=(20, 6))
    for number, (part, origins) in enumerate(texts(count)):
        start = time.process_time()
        results = []
        for text in part:
            line, sketch = normalize_text(text), MinHash(num_perm=120)
            sketch.update_batch([line[at : at + 5].encode() for at in range(max(1, len(line) - 4))])
            results.append([key for key in index.query(sketch) if sketches[key].jaccard(sketch) >= SIMILARITY])
            index.insert(len(sketches), sketch)
            sketches.append(sketch)
        seconds += time.process_time() - start
        first = number * _AT_A_TIME
        found += [(similar, origin in results[later - first]) for later, origin, similar in alike(first, part, origins)]
    return {"texts": count, "seconds": seconds, "texts_per_second": count / seconds, **recalls(found)}


def alike(first: int, part: list[str], origins: list[int]) -> list[tuple[int, int, float]]:
    """(later, origin, exact similarity) of what was planted in a part that begins with text `first`."""
    pairs = [(first + place, origin) for place, origin in enumerate(origins) if origin != first + place]
    return [(later, origin, jaccard(part[later - first], part[origin - first])) for later, origin in pairs]


def recalls(found: list[tuple[float, bool]]) -> dict[str, float]:
    """The share that was found of pairs alike to 0.8 or more, where the estimate's error cuts, and to 0.9 or more."""
    return {
        f"recall_from_{least}": float(np.mean([hit for similar, hit in found if similar >= least]))
        for least in (0.8, 0.9)
    }


def images(count: int, distance: int = 4) -> dict[str, float]:
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, count, np.uint64)
    planted = np.arange(9, count, 10)
    hashes[planted] = hashes[planted - 1]
    for _ in range(distance):
        hashes[planted] ^= np.uint64(1) << draw.integers(0, 64, len(planted), np.uint64)
    start = time.process_time()
    pairs = pairs_within(np.unique(hashes), distance)
    seconds = time.process_time() - start
    return {"hashes": count, "bits": distance, "seconds": seconds, "pairs": len(pairs), "planted": len(planted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--peer-texts", type=int, default=10_000)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "ours": ours(options.texts),
        "datasketch": datasketch(options.peer_texts),
        "images": images(options.texts),
    }
    found["times_faster"] = found["ours"]["texts_per_second"] / found["datasketch"]["texts_per_second"]
    print(json.dumps(found, indent=2))
    write("near_duplicates", machine("numpy", "datasketch"), {"similarity": SIMILARITY}, found)


if __name__ == "__main__":
    main()
