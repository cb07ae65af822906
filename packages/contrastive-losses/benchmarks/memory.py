"""Peak memory of one step on a CPU as the batch grows: this loss, and the careful loop while it fits.

OMP_NUM_THREADS=1 python benchmarks/memory.py
"""

import argparse
from pathlib import Path

from measure import RESULTS, peak_bytes_on_cpu, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--loop-rows", type=int, default=4096, help="the largest batch that the loop is given")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--results", type=Path, default=RESULTS / "memory.json")
    options = parser.parse_args()
    dims = tuple(options.dims)

    print(f"dims {dims}, float32, forward and backward; MiB above the inputs, and times the size of the two inputs")
    results = []
    for rows in options.rows:
        inputs = 2 * rows * max(dims) * 4
        peak = {"contrastive_losses": peak_bytes_on_cpu("contrastive_losses", rows, max(dims), dims)}
        if rows <= options.loop_rows:
            peak["careful loop"] = peak_bytes_on_cpu("careful loop", rows, max(dims), dims)
        results.append({"rows": rows, "input_bytes": inputs, "peak_bytes": peak})
        shown = "  ".join(f"{name} {value / 2**20:8.1f} ({value / inputs:5.1f}x)" for name, value in peak.items())
        print(f"  {rows:6d} pairs  {shown}")
    write(options.results, "cpu", {"dims": dims}, results)


if __name__ == "__main__":
    main()
