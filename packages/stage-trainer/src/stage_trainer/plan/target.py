"""What of a device decides which kernels run, and stand-ins for the attention that PyTorch chooses there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from text_tower.attention import Attend, sdpa
from text_tower.packed import ByLength
from torch import Tensor

from stage_trainer.plan.devices import Device

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Target:
    """What of a device decides which kernels run: passes for two devices that agree in it are one.

    Attributes:
        cuda: a GPU, or else a CPU.
        flash: whether PyTorch's variable-length attention runs there.
        bf16: whether autocast computes in bfloat16.
        fp8: whether the towers' blocks multiply in 8 bits.
    """

    cuda: bool
    flash: bool
    bf16: bool
    fp8: bool = False

    @classmethod
    def of(cls, device: Device, precision: str, fp8: bool = False) -> Target:
        """That of a device that computes in "bf16" or "fp32"."""
        bf16 = precision == "bf16"
        return cls(device.kind == "cuda", bf16 and device.capability >= (8, 0), bf16, fp8)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.cuda else HOST

    def attend_images(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """The kernel that PyTorch chooses there, which keeps what others do; None: the tower's own choice is right."""
        if not self.cuda:
            return None
        return _flash if self.bf16 else _efficient

    def attend_texts(self) -> Attend | None:
        """Likewise, for packed texts."""
        if not self.cuda:
            return None
        return _flash_varlen if self.flash else partial(sdpa, kernel=self.attend_images())

    def switch_autocast(self) -> None:
        """torch.autocast switches itself off for "cuda" where there is no GPU."""
        torch.set_autocast_enabled(self.device.type, self.bf16)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
    return out


def _flash_varlen(q: Tensor, k: Tensor, v: Tensor, layout: ByLength) -> Tensor:
    cu, longest = layout.cu_seqlens, layout.max_seqlen
    out: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, longest, longest, 0.0, False, False)[0]
    return out
