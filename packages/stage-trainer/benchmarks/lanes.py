"""What the order of samples costs a rank, and how far apart it brings what stood side by side in a shard.

    OMP_NUM_THREADS=1 python packages/stage-trainer/benchmarks/lanes.py            # three minutes, 2 GB

The cost is that of 800 million samples in 80,000 shards out of two sources, batches of 16,384, to one of 64 ranks;
times are of a processor, the median and the longest of 200 batches. The peers' orders are made by their own code:
`webdataset`'s shuffle with the buffers of `open_clip_train.data`, and `get_shuffle` of mosaicml-streaming 0.13
(`pip install --no-deps mosaicml-streaming==0.13.0`; without it its rows are left out), both with their defaults.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
import tracemalloc
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from common import write
from stage_trainer.data.lanes import SourceOrder
from stage_trainer.data.sampler import TaskSampler

RANKS, WORKERS = 8, 2
"""Of the comparison."""


def cost(shards: int, samples: int, batch: int, ranks: int) -> dict[str, float]:
    """Milliseconds and MiB of two sources of so many shards each."""
    tracemalloc.start()
    orders = [SourceOrder([samples] * shards, seed, 64) for seed in (1, 2)]
    memory = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    began = time.process_time()
    orders = [SourceOrder([samples] * shards, seed, 64) for seed in (1, 2)]
    opened = time.process_time() - began
    sampler = TaskSampler(orders, [1, 1], batch, one_source=False)
    taken = []
    for n in range(90_000, 90_201):
        began = time.process_time()
        sampler.part(n, ranks // 2, ranks)
        taken.append(time.process_time() - began)
    began = time.process_time()
    sampler.part(90_201, 0, 1)
    whole = time.process_time() - began
    return {
        "ms to make the order": 1e3 * opened,
        "MiB of the order": memory,
        "ms to seek to step 90,000": 1e3 * taken[0],
        "ms a batch, median": 1e3 * float(np.median(taken[1:])),
        "ms a batch, longest": 1e3 * max(taken[1:]),
        "ms of the first batch of a single rank": 1e3 * whole,
    }


def ours(shards: int, samples: int, batch: int, lanes: int) -> np.ndarray:
    """The samples of an epoch, batch after batch."""
    order = SourceOrder([samples] * shards, 1, lanes)
    bounds = [(start, min(start + batch, order.samples)) for start in range(0, order.samples, batch)]
    return np.concatenate([order.part(start, stop, 0, stop - start)[0] for start, stop in bounds])


def open_clips(shards: int, samples: int, batch: int) -> np.ndarray:
    """The order of `get_wds_dataset`: shards shuffled, split by rank and worker, samples through a buffer; each worker
    makes a rank's whole batch, in turn."""
    data = importlib.import_module("open_clip_train.data")
    detshuffle, shuffle = data.detshuffle2, importlib.import_module("webdataset.filters")._shuffle
    urls = list(detshuffle(data._SHARD_SHUFFLE_SIZE, data._SHARD_SHUFFLE_INITIAL, seed=0).run(iter(range(shards))))

    def stream(rank: int, worker: int) -> Iterator[int]:
        mine = urls[rank::RANKS][worker::WORKERS]
        read = (shard * samples + number for shard in mine for number in range(samples))
        buffers = data._SAMPLE_SHUFFLE_SIZE, data._SAMPLE_SHUFFLE_INITIAL
        mixed: Iterator[int] = shuffle(read, *buffers, random.Random(rank * WORKERS + worker))
        return mixed

    of_rank = batch // RANKS
    streams = [np.fromiter(stream(rank, worker), np.int64) for rank in range(RANKS) for worker in range(WORKERS)]
    whole = min(map(len, streams)) // of_rank
    cut = np.stack([one[: whole * of_rank].reshape(whole, of_rank) for one in streams])
    by_step = cut.reshape(RANKS, WORKERS, whole, of_rank).transpose(2, 1, 0, 3)  # batch after batch of each worker
    return by_step.reshape(-1)


def mosaics(shards: int, samples: int, algorithm: str) -> np.ndarray | None:
    """The order of StreamingDataset with a canonical node for each of `RANKS` machines, with its default block."""
    root = next((Path(p, "streaming") for p in sys.path if Path(p, "streaming/base/shuffle").is_dir()), None)
    if root is None:
        return None
    for name, folder in (("streaming", root), ("streaming.base", root / "base")):
        sys.modules[name] = package = types.ModuleType(name)  # without all that they import
        package.__path__ = [str(folder)]
    get_shuffle = importlib.import_module("streaming.base.shuffle").get_shuffle
    block = max(4_000_000 // RANKS, 1 << 18)
    ids: np.ndarray = get_shuffle(algorithm, np.full(shards, samples), RANKS, 1, 0, block)
    return ids.reshape(RANKS, -1).T.reshape(-1).astype(np.int64)  # each node has its stretch


def mixing(order: np.ndarray, samples: int, batch: int) -> dict[str, float]:
    """How many samples after (or before) its neighbour in the shard a sample comes; and what a batch is made of."""
    whole = order[: len(order) // batch * batch].reshape(-1, batch)
    order = np.random.default_rng(0).permuted(whole, axis=1).reshape(-1)  # a place within a batch means nothing
    place = np.full(int(order.max()) + 1, -1, dtype=np.int64)
    place[order] = np.arange(len(order))
    first = np.arange(len(place) - 1)
    first = first[(first % samples != samples - 1) & (place[:-1] >= 0) & (place[1:] >= 0)]
    apart = np.abs(place[first + 1] - place[first])
    batches = whole // samples
    counts = [np.unique(each, return_counts=True)[1] for each in batches[:: max(1, len(batches) // 100)]]
    percentiles = {f"apart, {p} % at most": float(np.percentile(apart, p)) for p in (1, 10, 50, 90)}
    return {
        **percentiles,
        "pairs in one batch, share": float((place[first] // batch == place[first + 1] // batch).mean()),
        "shards in a batch": float(np.mean([len(each) for each in counts])),
        "largest share of a shard in a batch": float(np.mean([each.max() / batch for each in counts])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few samples, to see that it runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results") / "lanes.json")
    options = parser.parse_args()
    shards, samples, batch = (64, 500, 1024) if options.small else (1280, 10_000, 16_384)
    results: dict[str, object] = {"cost": cost(shards if options.small else 40_000, samples, batch, 64)}
    orders: dict[str, Callable[[], np.ndarray | None]] = {
        "lanes: 64": lambda: ours(shards, samples, batch, 64),
        "lanes: 1 (four shards at a time, as before lanes)": lambda: ours(shards, samples, batch, 1),
        "lanes: 256": lambda: ours(shards, samples, batch, 256),
        "open_clip": lambda: open_clips(shards, samples, batch),
        "streaming py1e": lambda: mosaics(shards, samples, "py1e"),
        "streaming py1br": lambda: mosaics(shards, samples, "py1br"),
    }
    for name, make in orders.items():
        order = make()
        if order is not None:
            results[name] = mixing(order, samples, batch)
            print(name, results[name], flush=True)
    settings = {"shards": shards, "samples of a shard": samples, "batch": batch, "ranks": RANKS, "workers": WORKERS}
    write(options.results, settings, results)


if __name__ == "__main__":
    main()
