"""Whether a run computes on GPUs: never on the CPU only because a driver is too old."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from stage_trainer.errors import UserError

_OLDEST_DRIVER = {11: "450.80", 12: "525.60", 13: "580.65"}
"""Of Linux, by CUDA's major version (CUDA Toolkit release notes, table "Minimum Required Driver Version for CUDA Minor
Version Compatibility")."""

_FP8 = "8.9 (Ada), 9.0 (Hopper) or later"


def uses_gpu(device: str, precision: str, say: Callable[[str], None] = print) -> bool:
    """Whether this rank computes on a GPU; with `device: cpu` GPUs are hidden from this process.

    Args:
        device, precision: the recipe's.
        say: gets a line where `precision: auto` means a CPU beside a GPU that PyTorch cannot use.

    Raises:
        UserError: an NVIDIA GPU that PyTorch cannot use, or none where the recipe asks for bf16.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # libraries ask torch, too
        return False
    if torch.cuda.is_available():
        return True
    fault = _fault() if _nvidia_gpu() else ""
    if precision == "auto":
        if fault:
            say(f"training on the CPU, as precision: auto allows; {fault}")
        return False
    if fault:
        raise UserError(f"{fault}. To train on the CPU, set device=cpu or precision=auto")
    if precision == "bf16":
        raise UserError(
            "the recipe says precision: bf16, and this machine has no GPU; start it where there is one, or set "
            "precision=auto or device=cpu to train on the CPU"
        )
    return False


def check_fp8(wanted: bool | str, precision: str, device: torch.device) -> None:
    """Whether a stage's `fp8` can run here.

    Args:
        wanted: the stage's.
        precision: "bf16" or "fp32", as it is on this device.

    Raises:
        UserError: what is missing.
    """
    if not wanted:
        return
    if precision != "bf16":
        raise UserError("'fp8' is for towers in bfloat16, and precision: auto is fp32 on this machine; leave 'fp8' out")
    if device.type == "cpu":
        if wanted != "emulate":
            raise UserError(
                f"'fp8' needs a GPU of compute capability {_FP8}, and this run is on a CPU; leave 'fp8' out, or set it "
                "to 'emulate', which computes the same numbers on a CPU, slowly"
            )
        return
    if wanted == "emulate":
        raise UserError("'fp8' is 'emulate', which is for CPUs, and this run is on a GPU; set it to true")
    if torch.version.hip:
        raise UserError("'fp8' is for NVIDIA GPUs: AMD's have another format of 8 bits; leave it out")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise UserError(
            f"'fp8' needs a GPU of compute capability {_FP8}, and {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}; leave 'fp8' out"
        )
    if capability == (8, 9) and _numbers(torch.__version__.partition("+")[0])[:2] < (2, 12):
        raise UserError(
            f"'fp8' on a GPU of compute capability 8.9 needs PyTorch 2.12 or later, and this is {torch.__version__}, "
            "whose products in 8 bits may hang there (pytorch#177651); install a newer one, or leave 'fp8' out"
        )


def _nvidia_gpu() -> bool:
    """Whether this machine, or container, has one, whatever PyTorch makes of it."""
    if Path("/proc/driver/nvidia/version").exists() or any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


def _fault() -> str:
    """Why PyTorch cannot use the GPU, and what would fit."""
    driver, built = _driver(), torch.version.cuda
    found = (
        f"this machine has an NVIDIA GPU (driver {driver or 'unknown'}), which PyTorch {torch.__version__} cannot use"
    )
    if built is None:
        return f"{found}, because it was built without CUDA; install a PyTorch with CUDA"
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES", "0")).strip() in ("", "-1"):
        return f"{found}, because CUDA_VISIBLE_DEVICES is {hidden!r}; unset it"
    needed = _OLDEST_DRIVER.get(int(built.partition(".")[0]))
    if driver and needed and _numbers(driver) < _numbers(needed):
        fits = [str(major) for major, oldest in _OLDEST_DRIVER.items() if _numbers(oldest) <= _numbers(driver)]
        other = f", or a PyTorch that was built for CUDA {fits[-1]}" if fits else ""
        return f"{found}: it was built for CUDA {built}, which needs driver {needed} or later; install one{other}"
    return f"{found}: it was built for CUDA {built}, and CUDA says: {_said_by_cuda()}"


def _driver() -> str | None:
    """The version of NVIDIA's driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        if not shutil.which("nvidia-smi"):
            return None
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60).stdout
    version = re.search(r"(?<![\d.])\d{3,}(\.\d+)+", text)
    return version[0] if version else None


def _said_by_cuda() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return "no device"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
