"""Devices: memory, speed, and what they compute in.

Peaks are dense, for products that sum in float32, from the vendors' data sheets (sparse figures are twice as high and
mean nothing here); memory is what `torch.cuda.get_device_properties` has of it, rounded down.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Literal

import torch

from stage_trainer.errors import UserError

GIB = 2**30
TERA = 1e12


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU.

    Attributes:
        name: as `--gpu` takes it.
        memory: bytes.
        bf16, fp16, fp32: peak operations a second of matrix products; None where unsupported or unknown.
        bandwidth: of its memory, bytes a second.
        capability: CUDA's compute capability; (0, 0) for others.
        torch_names: what `torch.cuda.get_device_name` calls it.
        kind: where the towers run, "cuda" (ROCm too) or "cpu".
    """

    name: str
    memory: int
    bf16: float | None
    fp16: float | None
    fp32: float | None
    bandwidth: float | None
    capability: tuple[int, int] = (0, 0)
    torch_names: tuple[str, ...] = ()
    kind: Literal["cuda", "cpu"] = "cuda"

    def peak(self, precision: str) -> float | None:
        """Operations a second in a recipe's `precision`, of the one device."""
        return self.bf16 if precision == "bf16" else self.fp32

    def precision(self, wanted: str) -> str:
        """A recipe's `precision` on this device: `auto` is bf16 where it has it."""
        return ("bf16" if self.bf16 else "fp32") if wanted == "auto" else wanted


def _gpu(
    name: str,
    gib: float,
    peaks: tuple[float | None, float, float],
    terabytes: float,
    capability: tuple[int, int],
    *torch_names: str,
) -> Device:
    bf16, fp16, fp32 = (None if peak is None else peak * TERA for peak in peaks)
    return Device(name, int(gib * GIB), bf16, fp16, fp32, terabytes * TERA, capability, torch_names)


# fmt: off
_GPUS = (
    #     name            GiB      bf16    fp16    fp32    TB/s
    _gpu("b200-180gb",    178.3, (2250.0, 2250.0, 75.0),  7.7,   (10, 0), "NVIDIA B200"),
    _gpu("h200-141gb",    139.7, (989.4,  989.4,  66.9),  4.8,   (9, 0), "NVIDIA H200"),
    _gpu("h100-80gb",      79.1, (989.4,  989.4,  66.9),  3.35,  (9, 0), "NVIDIA H100 80GB HBM3"),
    _gpu("h100-nvl-94gb",  93.0, (835.5,  835.5,  60.0),  3.9,   (9, 0), "NVIDIA H100 NVL"),
    _gpu("h100-pcie-80gb", 79.1, (756.0,  756.0,  51.0),  2.0,   (9, 0), "NVIDIA H100 PCIe"),
    _gpu("a100-80gb",      79.1, (312.0, 312.0, 19.5), 2.039, (8, 0), "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
    _gpu("a100-40gb",      39.3, (312.0, 312.0, 19.5), 1.555, (8, 0), "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    _gpu("l40s",           44.3, (362.1,  362.1,  91.6),  0.864, (8, 9), "NVIDIA L40S"),
    _gpu("a40",            44.3, (149.7,  149.7,  37.4),  0.696, (8, 6), "NVIDIA A40"),
    _gpu("a10",            22.0, (125.0,  125.0,  31.2),  0.600, (8, 6), "NVIDIA A10"),
    _gpu("l4",             22.0, (121.0,  121.0,  30.3),  0.300, (8, 9), "NVIDIA L4"),
    _gpu("rtx-5090",       31.3, (209.5,  209.5,  104.8), 1.792, (12, 0), "NVIDIA GeForce RTX 5090"),
    _gpu("rtx-4090",       23.5, (165.2,  165.2,  82.6),  1.008, (8, 9), "NVIDIA GeForce RTX 4090"),
    _gpu("rtx-3090",       23.5, (71.0,   71.0,   35.6),  0.936, (8, 6), "NVIDIA GeForce RTX 3090"),
    _gpu("v100-32gb",      31.7, (None,   125.0,  15.7),  0.900, (7, 0), "Tesla V100-SXM2-32GB"),
    _gpu("v100-16gb",      15.7, (None,   125.0,  15.7),  0.900, (7, 0), "Tesla V100-SXM2-16GB"),
    _gpu("t4",             14.5, (None,   65.0,   8.1),   0.320, (7, 5), "Tesla T4"),
    _gpu("mi300x",        191.5, (1307.4, 1307.4, 163.4), 5.3,   (0, 0), "AMD Instinct MI300X"),
    _gpu("mi325x",        255.5, (1307.4, 1307.4, 163.4), 6.0,   (0, 0), "AMD Instinct MI325X"),
)
# fmt: on
DEVICES = {device.name: device for device in _GPUS}


def device(name: str, *, memory: str | None = None, peak: float | None = None) -> Device:
    """A device of the table, or "cpu", with the given figures in place of the table's.

    Args:
        name: as in the table.
        memory: such as "24GiB" or "80GB"; for a CPU without it, what is free now.
        peak: operations a second of matrix products, in whatever precision is used.

    Raises:
        UserError: an unknown device, or a memory that cannot be read.
    """
    if name == "cpu":
        found = Device("cpu", free_memory(torch.device("cpu")), None, None, None, None, kind="cpu")
    elif name in DEVICES:
        found = DEVICES[name]
    else:
        near = difflib.get_close_matches(name, [*DEVICES, "cpu"], n=1, cutoff=0.4)
        raise UserError(
            f"no device {name!r}; " + (f"did you mean {near[0]!r}? " if near else "") + f"known: "
            f"{', '.join([*DEVICES, 'cpu'])}; for another one take the most alike and give --memory and --peak"
        )
    if memory is not None:
        found = dataclasses.replace(found, memory=read_bytes(memory))
    if peak is not None:
        if not peak > 0:
            raise UserError(f"--peak is {peak:g}; expected operations a second above 0, such as 165e12")
        found = dataclasses.replace(found, bf16=found.bf16 and peak, fp16=found.fp16 and peak, fp32=peak)
    return found


def read_bytes(text: str) -> int:
    """ "24GiB", "80GB", "512 MiB" or a plain number of bytes."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": GIB}
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?B?)\s*", text, flags=re.IGNORECASE)
    found = float(match[1]) * units.get(match[2].upper(), 0) if match else 0.0
    if not 1 <= found < 2**60:
        raise UserError(f"--memory is {text[:40]!r}; expected something like 24GiB or 80GB")
    return int(found)


def peak_flops(where: torch.device, precision: str) -> float | None:
    """Peak operations a second of a device that is here, in "bf16" or "fp32"; None if it is not in the table, as no
    CPU is."""
    found = present(where)
    return found.peak(precision) if found else None


def present(where: torch.device) -> Device | None:
    """The table's entry for a device that is here."""
    if where.type != "cuda":
        return None
    name = torch.cuda.get_device_name(where)
    return next((entry for entry in _GPUS if name in entry.torch_names), None)


def free_memory(where: torch.device) -> int:
    """Bytes that this process may use: on a GPU what is free and what its allocator has reserved; on a CPU the
    machine's available memory, or the rest of the control group's limit if that is less."""
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        return free + torch.cuda.memory_reserved(where)
    return int(min(_available(), _group_limit()))


def _available() -> int:
    """Linux's MemAvailable; elsewhere all of the memory."""
    import os

    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_limit() -> float:
    """What a container may still take (control groups, version 2)."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            highest = limit.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as current:
            used = int(current.read())
    except OSError:
        return float("inf")
    return float("inf") if highest == "max" else max(0, int(highest) - used)
