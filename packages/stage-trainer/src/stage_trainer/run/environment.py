"""The environment of a run: threads, log output, memory and versions."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import platform
import resource
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch


def quiet() -> None:
    """Keeps the libraries' start-up chatter off the screen; warnings and errors still show."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)


def set_threads(local_ranks: int) -> None:
    """Shares the machine's cores between its ranks, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = int(os.environ.get("LOCAL_SIZE", local_ranks))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))


def keep_freed_memory() -> None:
    """Lets glibc reuse large blocks instead of giving them back to the system: batches differ in length, so a step on
    the CPU would otherwise spend a tenth of its time on fetching fresh pages. Other C libraries are left alone."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # of mallopt(3)
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)


def native_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """bf16 if the device itself multiplies in bfloat16, else fp32, also on a CPU that this torch does not know."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"


def peak_memory() -> int:
    """Peak main memory of the ranks' processes in bytes, summed over ranks."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mine = kib if sys.platform == "darwin" else kib * 1024
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return mine
    on_gpu = torch.distributed.get_backend() == "nccl"
    total = torch.tensor([mine], dtype=torch.int64, device="cuda" if on_gpu else "cpu")
    torch.distributed.all_reduce(total)
    return int(total)


def versions() -> dict[str, str]:
    """Of Python, the machine and the libraries that affect the numbers."""
    names = ("torch", "deepspeed", "timm", "transformers", "sentencepiece", "trilith-stage-trainer")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}", **found}
