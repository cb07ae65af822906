"""Fused AdamW whose count of steps is on the CPU while its parameter is on the GPU.

An illegal access was read off PyTorch's source; what really happens is told. In a process of its own: after such an
access CUDA is of no use to it. That our engines put the count beside its parameter is the part `engine`'s to hold.
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from report import NEEDS_CUDA, Report, difference, run_part


def measure(report: Report) -> None:
    report.note("step on the parameter's device", update(report.device, report.device))
    if not report.cuda:
        report.note("step on the CPU", NEEDS_CUDA)
    else:
        run = subprocess.run([sys.executable, __file__, "--alone"], capture_output=True, text=True, timeout=18)
        found = json.loads(run.stdout) if run.returncode == 0 else {"error": (run.stderr.splitlines() or [""])[-1]}
        report.note("step on the CPU", {"exit_status": run.returncode, **found})
    right = report.results["step on the parameter's device"]
    report.check(right["relative_error"] < 1e-6, f"fused AdamW is off by {right['relative_error']:.1e}")


def update(device: torch.device, of_step: torch.device) -> dict[str, float]:
    """One fused step from a state that is given, against the plain one."""

    def weight_after(fused: bool, where: torch.device) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 4096, device=device))
        weight.grad = torch.linspace(1, -2, 4096, device=device)
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        moments = {key: torch.full_like(weight, 0.25) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": torch.tensor(3.0, device=where), **moments}
        optimizer.step()
        return weight.detach().cpu()  # waits, so that an illegal access shows here

    expected = weight_after(False, torch.device("cpu"))
    return {"relative_error": difference(weight_after(True, of_step), expected)}


if __name__ == "__main__":
    if sys.argv[1:] == ["--alone"]:
        print(json.dumps(update(torch.device("cuda"), torch.device("cpu"))))
    else:
        run_part(measure)
