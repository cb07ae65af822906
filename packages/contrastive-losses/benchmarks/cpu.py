"""Time and peak memory of one step on one thread of a CPU: this loss, the careful loop, sentence-transformers' own.

OMP_NUM_THREADS=1 python benchmarks/cpu.py
"""

import argparse
from pathlib import Path

import torch
from measure import RESULTS, draw, median_seconds, peak_bytes_on_cpu, step, write

NAMES = ["contrastive_losses", "the same with statistics", "careful loop", "sentence-transformers"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256, 512, 768, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, dims = options.rows, tuple(options.dims)

    inputs = draw(rows, max(dims), "cpu", torch.float32)
    losses = {name: float(step(name, inputs, dims)) for name in NAMES}
    seconds = median_seconds(NAMES, inputs, dims, options.repeats)
    peaks = {name: peak_bytes_on_cpu(name, rows, max(dims), dims) for name in NAMES}

    print(f"{rows} pairs, dims {dims}, float32, forward and backward, one thread")
    results = {}
    for name in NAMES:
        results[name] = {
            "loss": losses[name],
            "seconds": seconds[name],
            "peak_bytes": peaks[name],
            "time_ratio": seconds[name] / seconds[NAMES[0]],
            "memory_ratio": peaks[name] / peaks[NAMES[0]],
        }
        shown = results[name]
        print(
            f"  {name:24s} {shown['seconds']:8.3f} s ({shown['time_ratio']:5.2f}x)  "
            f"{shown['peak_bytes'] / 2**20:8.1f} MiB ({shown['memory_ratio']:5.1f}x)  loss {shown['loss']:.6f}"
        )
    write(options.results, "cpu", {"rows": rows, "dims": dims, "repeats": options.repeats}, results)


if __name__ == "__main__":
    main()
