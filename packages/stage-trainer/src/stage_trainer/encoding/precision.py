"""The numbers in which the towers compute when they encode."""

from __future__ import annotations

import torch

from stage_trainer.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
_FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability of NVIDIA's; older GPUs emulate it, slowly


def dtype_of(asked: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products and attention; weights and results are float32 all the same (torch.autocast).

    Args:
        asked: one of `DTYPES`, or "auto": on GPUs bfloat16, float16 on those that do not multiply in bfloat16; float32
            elsewhere.

    Raises:
        UserError: another word.
    """
    if asked in DTYPES:
        return DTYPES[asked]
    if asked != AUTO:
        raise UserError(f"dtype is {asked!r}; expected {AUTO}, {', '.join(DTYPES)}")
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= _FIRST_WITH_BFLOAT16 else torch.float16


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which a tower's forward pass computes in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
