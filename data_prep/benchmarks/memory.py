"""Peak memory of importing text pairs, by their number: flat, packed or not.

python benchmarks/memory.py [--pairs 10000 1000000]
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine, write

PROGRAM = """
import resource, sys
from data_prep.execute import Execution, Target
from data_prep.sources.importing import import_source
from data_prep.sources.texts import Texts
import_source(Texts((sys.argv[1],)), Target(sys.argv[2], "pairs", 10_000), title="texts",
              execution=Execution(workers=1), log=lambda line: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--scratch", default=None, help="where the texts and shards go (default: the system's)")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for pairs in options.pairs:
            for name in ("pairs.jsonl", "pairs.jsonl.gz"):
                path, out = Path(scratch) / f"{pairs}-{name}", Path(scratch) / f"{pairs}-{name}-out"
                with gzip.open(path, "wt", 1) if name.endswith(".gz") else path.open("w") as file:
                    for number in range(pairs):
                        file.write(
                            json.dumps([f"question {number} of many", f"the answer to question {number} " * 5]) + "\n"
                        )
                command = [sys.executable, "-c", PROGRAM, str(path), str(out)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                peak = int(done.stdout.split()[-1]) * 1024
                results[f"{name}, {pairs}"] = {"peak_bytes": peak}
                print(f"{name:16s}{pairs:>10,} pairs{peak / 2**20:8.1f} MiB", flush=True)
                path.unlink()
                subprocess.run(["rm", "-r", str(out)], check=True)
    write("memory", machine(), {"pairs": options.pairs, "workers": 1}, results)


if __name__ == "__main__":
    main()
