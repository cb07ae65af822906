"""Peak memory of a training pass over 8 long texts, with and without checkpointing: what a token costs.

    python packages/text-tower/benchmarks/memory.py

Every figure is the growth of the process's peak resident memory over one forward and backward pass, in a process of its
own. Linear in tokens means that the cost of a token is the same at every length.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import torch
from common import SHAPES, batch, write
from text_tower import TextTower

TEXTS = 8


def measure(length: int, checkpointing: bool, width: int, layers: int) -> float:
    """MiB that a pass over `TEXTS` texts of `length` tokens adds to this process's peak."""
    config = dataclasses.replace(
        SHAPES["small"], width=width, layers=layers, heads=width // 64, mlp_width=4 * width, checkpointing=checkpointing
    )
    tower = TextTower(config).train()
    generator = torch.Generator().manual_seed(0)
    tower(batch([16], 1000, generator)[0]).sum().backward()  # what any pass needs, whatever its length
    packed = batch([length] * TEXTS, 1000, generator)[0]
    before = _peak_kib()
    tower(packed).square().sum().backward()
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    """Peak resident memory of this process (Linux). `getrusage` would count the process that started it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("LENGTH", "CHECKPOINTING"), help="measure this alone, print MiB")
    options = parser.parse_args()
    if options.one:
        print(measure(int(options.one[0]), options.one[1] == "True", options.width, options.layers))
        return
    results: dict[str, list[dict[str, float]]] = {}
    for checkpointing in (True, False):
        rows = []
        for length in options.lengths:
            size = ["--width", str(options.width), "--layers", str(options.layers)]
            command = [sys.executable, __file__, *size, "--one", str(length), str(checkpointing)]
            mib = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append(
                {"length": length, "mib": round(mib, 1), "kib_per_token": round(mib * 1024 / length / TEXTS, 2)}
            )
        results["checkpointing" if checkpointing else "all_kept"] = rows
    shape = {"width": options.width, "layers": options.layers, "dtype": "float32", "texts": TEXTS}
    write("memory", {"shape": shape, **results})


if __name__ == "__main__":
    main()
