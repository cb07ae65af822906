"""What a part writes: its JSON, anew after each figure, so that a part that dies leaves what it had found."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

NEEDS_CUDA = "needs CUDA"


@dataclass
class Report:
    """A part's figures and what is wrong with them.

    Attributes:
        path: of the JSON.
        device: "cuda", or with `--cpu` "cpu".
    """

    path: Path
    device: torch.device
    results: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    status: str = "running"

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def note(self, name: str, figures: Any) -> None:
        """Enters figures: numbers, texts, and lists and dicts of these."""
        self.results[name] = figures
        self._write()

    def check(self, holds: bool, problem: str) -> None:
        """The part goes on to its end, and has failed then."""
        if not holds:
            self.problems.append(problem)
            self._write()

    def tried(self, what: str, run: Callable[[], Any], absent: tuple[type[Exception], ...] = (ImportError,)) -> Any:
        """What `run` returns; or, as a text, why it cannot be had here: an exception that says what is missing, or too
        little memory. Any other one is a problem of this part, which goes on to its end."""
        try:
            return run()
        except absent as reason:
            return f"not {'installed' if isinstance(reason, ImportError) else 'here'}: {reason}"
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return "out of memory"
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {str(error)[:1000]}"
            self.check(False, f"{what}: {said}")
            return f"failed: {said}"

    def end(self, status: str) -> None:
        self.status = status
        self._write()

    def _write(self) -> None:
        content = {"status": self.status, "problems": self.problems, "results": finite(self.results)}
        passing = self.path.with_suffix(".part")
        passing.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        passing.replace(self.path)


def finite(value: Any) -> Any:
    """JSON has no number for what is not finite: the text says so, and is no figure."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else f"not finite: {value}"


def run_part(measure: Callable[[Report], None]) -> None:
    """A part as a program: `python PART.py RESULTS [--cpu]`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    report = Report(options.results, torch.device("cpu" if options.cpu else "cuda"))
    torch.manual_seed(0)
    try:
        if not options.cpu and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no GPU; `bash tests/gpu.sh --cpu` runs the same in a small size")
        if options.cpu:
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
            # Compiling takes longer than all else here, and other tests hold that blocks compile.
            torch.compiler.set_stance("force_eager")
        measure(report)
    except Exception as error:
        report.problems.append(f"{type(error).__name__}: {str(error)[:2000]}")
        traceback.print_exc()
    report.end("failed" if report.problems else "ok")
    raise SystemExit(bool(report.problems))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int, warm: int = 2) -> dict[str, Any]:
    """Median and least of so many runs after `warm` that do not count; the first of them, which compiles, apart."""
    first, times = 0.0, []
    for turn in range(warm + repeats):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        took = time.perf_counter() - began
        first = took if turn == 0 else first
        if turn >= warm:
            times.append(took)
    return {"seconds": statistics.median(times), "least_seconds": min(times), "first_seconds": first}


def peak_of(run: Callable[[], Any], device: torch.device) -> int | str:
    """Most bytes that the allocator had given out while `run` ran; a CPU's keeps no such account."""
    if device.type != "cuda":
        run()
        return NEEDS_CUDA
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the 2-norm."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
