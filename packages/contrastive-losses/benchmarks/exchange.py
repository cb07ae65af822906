"""Gathering the queries of all ranks beside passing them round in a ring: processor time and peak memory of one rank as
the batch grows, in real processes over gloo, and what both hold and send at sizes that need many GPUs, counted.

OMP_NUM_THREADS=1 python benchmarks/exchange.py             # two minutes
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contrastive_losses import matryoshka_info_nce
from measure import RESULTS, draw, resident, write

EXCHANGES = ("gather", "ring")
PAIRS, RANKS = (32_768, 262_144, 1_048_576), (8, 64, 256)
WIDTH, PREFIXES = 1024, 6
LINK = 50e9  # bytes a second that a GPU sends: 400 Gb/s
PRODUCTS = 400e12  # operations a second of a GPU in bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2048, 8192, 16384], help="of all ranks")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--results", type=Path, default=RESULTS / "exchange.json")
    options = parser.parse_args()
    dims = tuple(options.dims)
    print(f"{options.ranks} ranks, dims {dims}, float32, forward and backward; of one rank")
    measured = []
    for pairs in options.pairs:
        found = {name: of_ranks(name, options.ranks, pairs, dims) for name in EXCHANGES}
        assert abs(found["ring"]["loss"] / found["gather"]["loss"] - 1) < 1e-5
        measured.append({"pairs": pairs, **found})
        shown = (f"{name} {f['seconds']:6.2f} s {f['peak_bytes'] / 2**20:7.1f} MiB" for name, f in found.items())
        print(f"  {pairs:6d} pairs  ", "  ".join(shown))
    counted = [on_paper(pairs, ranks) for ranks in RANKS for pairs in PAIRS]
    settings = {"ranks": options.ranks, "dims": dims, "link": LINK, "products": PRODUCTS, "width": WIDTH}
    write(options.results, "cpu", settings, {"measured": measured, "counted": counted})


def of_ranks(exchange: str, ranks: int, pairs: int, dims: tuple[int, ...]) -> dict[str, float]:
    """Of the rank that needs most."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(ranks) as pool:
        each = pool.starmap(_rank, [(exchange, rank, ranks, pairs // ranks, dims, folder) for rank in range(ranks)], 1)
    return {name: max(found[name] for found in each) for name in each[0]}


def _rank(exchange: Any, rank: int, ranks: int, rows: int, dims: tuple[int, ...], folder: str) -> dict[str, float]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)

    def step(inputs: list[torch.Tensor]) -> float:
        queries, targets, temperature = inputs
        options: dict[str, Any] = {"temperature": temperature, "dims": dims, "exchange": exchange}
        loss = matryoshka_info_nce(queries, targets, group=dist.group.WORLD, **options)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        return loss.item()

    step(draw(64, max(dims), "cpu", torch.float32))  # loads what a first call loads
    inputs = draw(rows, max(dims), "cpu", torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    before, began = resident("VmRSS"), time.process_time()
    loss = step(inputs)
    seconds, peak = time.process_time() - began, resident("VmHWM") - before
    dist.destroy_process_group()
    return {"seconds": seconds, "peak_bytes": peak, "loss": loss}


def on_paper(pairs: int, ranks: int) -> dict[str, Any]:
    """Bytes that one rank holds of others' rows, and sends, in a step: queries in bfloat16, gradients in float32,
    vectors of each prefix in float64. Seconds at `LINK`, beside those of the rank's products at `PRODUCTS`."""
    row, gradient, vectors = 2 * WIDTH, 4 * WIDTH, 8 * PREFIXES
    own = pairs // ranks
    sent = {"gather": pairs * (row + gradient + 9 * vectors), "ring": pairs * (2 * row + gradient + 9 * vectors)}
    held = {"gather": pairs * (row + gradient + 10 * vectors), "ring": own * (3 * row + 4 * gradient + 20 * vectors)}
    return {
        "pairs": pairs,
        "ranks": ranks,
        "held": held,
        "sent": sent,
        "seconds": {name: of / LINK for name, of in sent.items()},
        "products_seconds": 8 * pairs * own * WIDTH / PRODUCTS,
    }


if __name__ == "__main__":
    main()
