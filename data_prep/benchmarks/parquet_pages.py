"""Peak memory of reading large values from a parquet file of one row group, by how its writer set the pages.

python benchmarks/parquet_pages.py [--rows 1024] [--kilobytes 300]

A page of a packed column is the least that can be unpacked. pyarrow looks at a page's size after each
`write_batch_size` values, 1,024 by default, whatever `data_page_size` says.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
from common import machine, write
from pyarrow import parquet

PROGRAM = """
import sys
from pathlib import Path
from data_prep.sources.parquet import parquet_pieces, read_parquet
rows = 0
for piece in parquet_pieces([Path(sys.argv[1])], 1000, columns=()):
    for _, row in read_parquet(piece, ["image"]):
        rows += row["image"] is not None
# Not ru_maxrss, which a process takes over from the one that started it.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(rows, int(peak) * 1024)
"""
WRITERS: dict[str, dict[str, Any]] = {
    "snappy (the default of pyarrow and pandas)": {},
    "zstd": {"compression": "zstd"},
    "snappy, write_batch_size=16": {"write_batch_size": 16},
    "snappy, row_group_size=64": {"row_group_size": 64},
    "not packed": {"compression": "none"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--kilobytes", type=int, default=300, help="of an image (default: %(default)s)")
    options = parser.parse_args()
    images = [os.urandom(1000 * options.kilobytes) for _ in range(options.rows)]
    table = pyarrow.table({"image": pyarrow.array(images, pyarrow.binary())})
    del images
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, settings in WRITERS.items():
            path = Path(scratch) / "images.parquet"
            parquet.write_table(table, path, use_dictionary=False, **settings)
            command = [sys.executable, "-c", PROGRAM, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            assert int(done[0]) == options.rows
            results[name] = {"peak_bytes": int(done[1]), "file_bytes": path.stat().st_size}
            print(f"{name:45s}{int(done[1]) / 2**20:8.0f} MiB", flush=True)
    write("parquet_pages", machine("pyarrow"), {"rows": options.rows, "kilobytes": options.kilobytes}, results)


if __name__ == "__main__":
    main()
