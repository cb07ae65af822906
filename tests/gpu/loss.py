"""The loss on a GPU: its Triton kernels' tests, its errors, and its time and memory beside others at the paper's batch.

16,384 pairs of 1,024 dims with six prefixes; embeddings in bfloat16, and in float32, as training has them.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from report import NEEDS_CUDA, Report, difference, peak_of, run_part, seconds_of
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "packages" / "contrastive-losses" / "benchmarks"))

from contrastive_losses import matryoshka_info_nce  # noqa: E402
from contrastive_losses.plain import plain_info_nce  # noqa: E402
from losses import LOSSES, Loss  # noqa: E402
from measure import draw  # noqa: E402

TESTS = ROOT / "tests" / "contrastive_losses" / "test_triton_tiles.py"
LOSS_ERROR, GRADIENT_ERROR = 1e-4, 2e-2
"""Against float64, for bfloat16 embeddings; the tests of the kernels are stricter, and say which."""


def measure(report: Report) -> None:
    rows, dims = (16384, (64, 128, 256, 512, 768, 1024)) if report.cuda else (256, (16, 32, 64))
    report.note("settings", {"rows": rows, "dims": dims})
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        errors = errors_against_float64(min(1024, rows), dims, report.device)
    refused = [str(each.message) for each in heard if "Triton" in str(each.message)]
    report.check(not refused, f"the loss does not take its kernels: {refused}")
    report.note("errors", errors)
    report.check(errors["loss"] < LOSS_ERROR, f"the loss is off by {errors['loss']:.1e}")
    worst = max(value for name, value in errors.items() if name != "loss")
    report.check(worst < GRADIENT_ERROR, f"a gradient is off by {worst:.1e}")

    found: dict[str, Any] = {}
    for name, dtype, loss in contenders():
        repeats = 1 if not report.cuda else 20 if name.startswith("contrastive_losses") else 5
        found[name] = report.tried(name, partial(figures, loss, dtype, rows, dims, report.device, repeats))
        report.note("losses", found)
    larger = partial(figures, LOSSES["contrastive_losses"], torch.bfloat16, 4 * rows, dims, report.device, 2)
    report.note("at four times the rows", report.tried("at four times the rows", larger))
    # Last: how long they take to compile is not known.
    tests = report.tried("Triton tests", partial(triton_tests, report)) if report.cuda else NEEDS_CUDA
    report.note("triton_tests", tests)


def contenders() -> list[tuple[str, torch.dtype, Loss]]:
    found = [(name, torch.bfloat16, loss) for name, loss in LOSSES.items()]
    found.append(("contrastive_losses, float32", torch.float32, LOSSES["contrastive_losses"]))
    precisions: tuple[Literal["bf16", "tf32"], ...] = ("bf16", "tf32")
    for precision in precisions:
        of_it: Any = partial(with_precision, precision)
        found.append((f"contrastive_losses, float32, precision {precision}", torch.float32, of_it))
    return [("plain PyTorch" if name == "careful loop" else name, dtype, loss) for name, dtype, loss in found]


def with_precision(
    precision: Literal["bf16", "tf32"], queries: Tensor, targets: Tensor, temperature: Tensor, dims: Sequence[int]
) -> Any:
    return matryoshka_info_nce(queries, targets, temperature=temperature, dims=dims, precision=precision)


def figures(
    loss: Loss, dtype: torch.dtype, rows: int, dims: tuple[int, ...], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Time and the peak above the inputs of a step, forward and backward."""
    inputs = draw(rows, max(dims), str(device), dtype)
    step = one_step(loss, inputs, dims)
    value = float(step())  # compiles, too
    for tensor in inputs:
        tensor.grad = None
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    peak = peak_of(step, device)
    above = peak - before if isinstance(peak, int) else peak
    return {"rows": rows, "loss": value, "peak_bytes": above, **seconds_of(step, device, repeats, warm=1)}


def one_step(loss: Loss, inputs: list[Tensor], dims: tuple[int, ...]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        for tensor in inputs:
            tensor.grad = None
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=inputs[0].dtype == torch.bfloat16):
            found = loss(inputs[0], inputs[1], inputs[2], dims)
        found.backward()
        return found.detach()

    return step


def errors_against_float64(rows: int, dims: tuple[int, ...], device: torch.device) -> dict[str, float]:
    inputs = draw(rows, max(dims), str(device), torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    loss = one_step(LOSSES["contrastive_losses"], inputs, dims)()
    expected = plain_info_nce(exact[0], exact[1], temperature=exact[2], dims=dims)
    expected.backward()
    errors = {"loss": difference(loss, expected)}
    for name, ours, theirs in zip(("queries", "targets", "temperature"), inputs, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        errors[name] = difference(ours.grad, theirs.grad)
    return errors


def triton_tests(report: Report) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    if find_spec("xdist"):  # most of their time is that of compiling
        command += ["-n", "8"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    last = (run.stdout.strip().splitlines() or [""])[-1]
    report.check(run.returncode == 0, f"the tests of the Triton kernels: {last}")
    return {"exit_status": run.returncode, "summary": last, "failures": run.stdout[-1500:] if run.returncode else ""}


if __name__ == "__main__":
    run_part(measure)
