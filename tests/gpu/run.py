"""Runs the parts one after another, each in a process of its own with a time limit, and tells what they found.

`bash tests/gpu.sh --help`; tests/README.md says more. The folder of results gets a JSON for each part and all.json with
all of them, written anew after each part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Seconds of each part on a GPU, a tenth more than an H200 took; the last one has what the others leave of nine minutes.
# The first one also waits for a fresh machine's disk and driver. In this order: what tells most comes first.
PARTS = {
    "versions": 20,
    "fused_adamw": 25,
    "loss": 97,
    "towers": 64,
    "engine": 65,
    "step": 170,
    "workers": 10,
    "lora": 15,
    "chunk_profile": 38,
    "peers": 150,
}
ALL_SECONDS = 535
CPU_SECONDS = 900
"""Of a part with --cpu, where other processes may share the machine; alone all parts take less."""
TAIL = 4000


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash tests/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="the same in a tiny size on the CPU, to see that it runs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of results (default: runs/gpu)")
    parser.add_argument("--only", default=",".join(PARTS), help="these parts, with commas (default: all)")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)

    found: dict[str, Any] = {}
    end = time.monotonic() + ALL_SECONDS
    with tempfile.TemporaryDirectory() as scratch:
        for name in (name for name in PARTS if name in wanted):
            limit = CPU_SECONDS if options.cpu else min(PARTS[name], end - time.monotonic())
            found[name] = run_part(name, limit, options.cpu, Path(scratch))
            text = json.dumps(found[name], indent=2) + "\n"
            (options.out / f"{name}.json").write_text(text)
            (options.out / "all.json").write_text(json.dumps(found, indent=2) + "\n")
            print(line(name, found[name]), flush=True)
    print(f"\n{options.out / 'all.json'}\n")
    print("\n".join(line(name, part) for name, part in found.items()))
    return int(any(part["status"] != "ok" for part in found.values()))


def run_part(name: str, limit: float, cpu: bool, scratch: Path) -> dict[str, Any]:
    """The part's JSON with its time and how it ended; of one that fails the end of what it printed, too."""
    part: dict[str, Any] = {"part": name, "device": "cpu" if cpu else "cuda", "limit_seconds": round(limit, 1)}
    empty: dict[str, Any] = {"problems": [], "results": {}}
    if limit < 1:
        return {**part, "status": "no time left", "seconds": 0.0, **empty}
    path, log = scratch / f"{name}.json", scratch / f"{name}.log"
    command = [sys.executable, str(HERE / f"{name}.py"), str(path), *(["--cpu"] if cpu else [])]
    began = time.monotonic()
    with log.open("w") as output:
        # A session of its own: what a part starts ends with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment(scratch, cpu),
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        except BaseException:
            _kill(process)
            raise
    in_time = process.poll() is not None
    _kill(process)
    content = json.loads(path.read_text()) if path.exists() else {"status": "running", **empty}
    if content["status"] == "running":
        content["status"] = died(process.returncode) if in_time else "out of time"
    part |= {"status": content["status"], "seconds": round(time.monotonic() - began, 1)}
    part |= {"problems": content["problems"], "results": content["results"]}
    if part["status"] != "ok":
        part["end_of_output"] = log.read_text(errors="replace")[-TAIL:]
    return part


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the session's processes, if any is left
    process.wait()


def died(code: int) -> str:
    return f"died: {signal.strsignal(-code)}" if code < 0 else f"ended with {code}"


def environment(scratch: Path, cpu: bool) -> dict[str, str]:
    """The packages of this checkout, installed or not; no network; extensions that DeepSpeed compiles would show."""
    sources = [*sorted((ROOT / "packages").glob("*/src")), ROOT / "data_prep" / "src"]
    path = os.pathsep.join([*map(str, sources), *filter(None, [os.environ.get("PYTHONPATH")])])
    scratch.joinpath("extensions").mkdir(exist_ok=True)
    made = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(scratch / "extensions"),
        "GPU_SCRATCH": str(scratch),
    }
    if cpu:
        made |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    return made


def line(name: str, part: dict[str, Any]) -> str:
    said = "; ".join(problem.splitlines()[0][:160] for problem in part["problems"])
    return f"{name:14s} {part['status']:12s} {part['seconds']:6.1f} of {part['limit_seconds']:5.0f} s  {said}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
