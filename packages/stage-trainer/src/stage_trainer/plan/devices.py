"""Devices: memory, speed, and what they compute in. The one table of their constants.

Peaks are dense, for products that sum in float32, from the vendors' data sheets (sparse figures are twice as high and
mean nothing here); memory is what `torch.cuda.get_device_properties` has of it, rounded down. How much of a peak is
reached is measured, by others:

- large products: the tables of best matrix products ("MAMF") of github.com/stas00/ml-engineering, compute/accelerator
  (bf16: A100 SXM 271 and PCIe 253 of 312 TFLOP/s, H100 SXM 795 of 989, MI300X 668 and MI325X 785 of 1,300) and
  insights/when-to-upgrade-gpus (B200 1,745 of 2,250); RTX 4090: 156 of 165 (pytorch/pytorch#181718); V100 95 of 125,
  3090 Ti 81 of 80 (github.com/fanghostt/transformers-benchmarks). Where nothing was found, 0.8;
- memory: a copy reaches 4.3 of 4.8 TB/s on an H200; GDDR cards reach four fifths;
- flash-attn 2, which PyTorch has: 282 to 324 of 989 TFLOP/s on an H100, forward, heads of 64 channels, since it lacks
  Hopper's instructions (arXiv 2407.08608, figure 5); 50 to 73 % on an A100 (arXiv 2307.08691). Elsewhere an estimate;
- links: bus bandwidth of NCCL's all-reduce over eight devices of one machine (docs.alayanew.com, "NCCL-tests in
  practice": H100 460 GB/s, A100 230, over PCIe 5 35), elsewhere three quarters of the link of one direction.

Steps of this project's own towers were measured on an H200 (`tests/gpu/results/nvidia-h200.json`). Their attention, of
texts of some 40 tokens and of images of 129, forward and backward, reached 0.2 of its peak there, which the H100 is
taken to reach too; what `roofline` and `Device.launch` have from there, they say. `benchmarks/roofline.py` measures the
constants on the device that it runs on.
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
        tf32, fp8: as bf16.
        products, stream, attention: shares of the peak that large products, copies and fused attention reach.
        cores: that compute products side by side (multiprocessors); 0: not counted.
        link: bytes a second that a device exchanges with the others of its machine, in NCCL's bus bandwidth.
        launch: seconds in which the host issues one operation of PyTorch, forward and backward alike.
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
    tf32: float | None = None
    fp8: float | None = None
    products: float = 0.8
    stream: float = 0.9
    attention: float = 0.55
    cores: int = 0
    link: float | None = None
    launch: float = 60e-6  # Python, autograd, dispatcher and driver, measured beside an H200, in a virtual machine

    def peak(self, precision: str) -> float | None:
        """Operations a second in a recipe's `precision`, of the one device."""
        return self.bf16 if precision == "bf16" else self.fp32

    def precision(self, wanted: str) -> str:
        """A recipe's `precision` on this device: `auto` is bf16 where it has it."""
        return ("bf16" if self.bf16 else "fp32") if wanted == "auto" else wanted

    @property
    def timed(self) -> bool:
        """Whether enough of it is known to predict times."""
        return bool((self.bf16 or self.fp32) and self.bandwidth)


def _gpu(
    name: str,
    gib: float,
    peaks: tuple[float | None, ...],
    speeds: tuple[float, float],
    cores: int,
    shares: tuple[float, float, float],
    capability: tuple[int, int],
    *torch_names: str,
) -> Device:
    bf16, fp16, fp32, tf32, fp8 = (None if peak is None else peak * TERA for peak in peaks)
    products, stream, attention = shares
    return Device(
        name, int(gib * GIB), bf16, fp16, fp32, speeds[0] * TERA, capability, torch_names,
        tf32=tf32, fp8=fp8, products=products, stream=stream, attention=attention, cores=cores, link=speeds[1] * 1e9,
    )  # fmt: skip


_HBM, _GDDR = 0.9, 0.8
# fmt: off
_GPUS = (
    #    name             GiB     bf16    fp16    fp32   tf32    fp8     TB/s   GB/s cores products, memory, attention
    # NVIDIA B200, DGX B200 data sheets (NVLink 5: 900 GB/s each way)
    _gpu("b200-180gb",    178.3, (2250.0, 2250.0, 75.0,  1125.0, 4500.0), (7.7,   690), 148, (0.776, _HBM, 0.2),
         (10, 0), "NVIDIA B200"),
    # NVIDIA H200 and H100 data sheets (SXM, PCIe, NVL)
    _gpu("h200-141gb",    139.7, (989.4,  989.4,  66.9,  494.7,  1978.9), (4.8,   460), 132, (0.803, _HBM, 0.2),
         (9, 0), "NVIDIA H200"),
    _gpu("h100-80gb",     79.1,  (989.4,  989.4,  66.9,  494.7,  1978.9), (3.35,  460), 132, (0.803, _HBM, 0.2),
         (9, 0), "NVIDIA H100 80GB HBM3"),
    _gpu("h100-nvl-94gb", 93.0,  (835.5,  835.5,  60.0,  417.5,  1670.5), (3.9,   35),  132, (0.8,   _HBM, 0.2),
         (9, 0), "NVIDIA H100 NVL"),
    _gpu("h100-pcie-80gb", 79.1, (756.0,  756.0,  51.0,  378.0,  1513.0), (2.0,   35),  114, (0.8,   _HBM, 0.2),
         (9, 0), "NVIDIA H100 PCIe"),
    # NVIDIA A100 data sheet; the PCIe card's own clock is lower under load
    _gpu("a100-80gb",     79.1,  (312.0,  312.0,  19.5,  156.0,  None),   (2.039, 230), 108, (0.869, _HBM, 0.56),
         (8, 0), "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
    _gpu("a100-40gb",     39.3,  (312.0,  312.0,  19.5,  156.0,  None),   (1.555, 230), 108, (0.869, _HBM, 0.56),
         (8, 0), "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    # NVIDIA L40S, A40, A10, L4 data sheets (no NVLink in use: PCIe 4, 32 GB/s each way)
    _gpu("l40s",          44.3,  (362.1,  362.1,  91.6,  183.0,  733.0),  (0.864, 20),  142, (0.8,   _GDDR, 0.55),
         (8, 9), "NVIDIA L40S"),
    _gpu("a40",           44.3,  (149.7,  149.7,  37.4,  74.8,   None),   (0.696, 20),  84,  (0.8,   _GDDR, 0.55),
         (8, 6), "NVIDIA A40"),
    _gpu("a10",           22.0,  (125.0,  125.0,  31.2,  62.5,   None),   (0.600, 20),  72,  (0.8,   _GDDR, 0.55),
         (8, 6), "NVIDIA A10"),
    _gpu("l4",            22.0,  (121.0,  121.0,  30.3,  60.0,   242.0),  (0.300, 20),  58,  (0.8,   _GDDR, 0.55),
         (8, 9), "NVIDIA L4"),
    # NVIDIA architecture white papers: Blackwell RTX, Ada (AD102), Ampere (GA102), appendix tables
    _gpu("rtx-5090",      31.3,  (209.5,  209.5,  104.8, 104.8,  419.0),  (1.792, 35),  170, (0.8,   _GDDR, 0.55),
         (12, 0), "NVIDIA GeForce RTX 5090"),
    _gpu("rtx-4090",      23.5,  (165.2,  165.2,  82.6,  82.6,   330.3),  (1.008, 20),  128, (0.94,  _GDDR, 0.55),
         (8, 9), "NVIDIA GeForce RTX 4090"),
    _gpu("rtx-3090",      23.5,  (71.0,   71.0,   35.6,  35.6,   None),   (0.936, 20),  82,  (0.9,   _GDDR, 0.55),
         (8, 6), "NVIDIA GeForce RTX 3090"),
    # NVIDIA V100 and T4 data sheets; no flash attention there
    _gpu("v100-32gb",     31.7,  (None,   125.0,  15.7,  None,   None),   (0.900, 115), 80,  (0.76,  _HBM, 0.3),
         (7, 0), "Tesla V100-SXM2-32GB"),
    _gpu("v100-16gb",     15.7,  (None,   125.0,  15.7,  None,   None),   (0.900, 115), 80,  (0.76,  _HBM, 0.3),
         (7, 0), "Tesla V100-SXM2-16GB"),
    _gpu("t4",            14.5,  (None,   65.0,   8.1,   None,   None),   (0.320, 10),  40,  (0.7,   _GDDR, 0.3),
         (7, 5), "Tesla T4"),
    # AMD Instinct MI300X and MI325X data sheets (7 Infinity Fabric links of 64 GB/s)
    _gpu("mi300x",        191.5, (1307.4, 1307.4, 163.4, 653.7,  2614.9), (5.3,   330), 304, (0.514, 0.8, 0.3),
         (0, 0), "AMD Instinct MI300X"),
    _gpu("mi325x",        255.5, (1307.4, 1307.4, 163.4, 653.7,  2614.9), (6.0,   330), 304, (0.604, 0.8, 0.3),
         (0, 0), "AMD Instinct MI325X"),
)
# fmt: on
DEVICES = {device.name: device for device in _GPUS}


def device(
    name: str, *, memory: str | None = None, peak: float | None = None, bandwidth: float | None = None
) -> Device:
    """A device of the table, or "cpu", with the given figures in place of the table's.

    Args:
        name: as in the table.
        memory: such as "24GiB" or "80GB"; for a CPU without it, what is free now.
        peak: operations a second of matrix products, in whatever precision is used.
        bandwidth: of its memory, bytes a second.

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
            f"{', '.join([*DEVICES, 'cpu'])}; for another one take the most alike and give --memory, --peak and "
            "--bandwidth"
        )
    if memory is not None:
        found = dataclasses.replace(found, memory=read_bytes(memory))
    if peak is not None:
        if not peak > 0:
            raise UserError(f"--peak is {peak:g}; expected operations a second above 0, such as 165e12")
        found = dataclasses.replace(found, bf16=found.bf16 and peak, fp16=found.fp16 and peak, fp32=peak)
    return found if bandwidth is None else dataclasses.replace(found, bandwidth=bandwidth)


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


def alike(capability: tuple[int, int]) -> Device:
    """The table's entry whose compute capability comes next below a device's, for one that is not in the table."""
    if torch.version.hip:
        return DEVICES["mi300x"]
    below = [entry for entry in _GPUS if (0, 0) < entry.capability <= capability]
    return max(below, key=lambda entry: entry.capability, default=DEVICES["t4"])


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
