"""Trains text-image embedding models in stages, under DeepSpeed; `DualEncoder` is what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stage_trainer.dual_encoder import DualEncoder

__all__ = ["DualEncoder"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes seconds, and `stage-trainer --help` should not.
    if name == "DualEncoder":
        from stage_trainer.dual_encoder import DualEncoder

        return DualEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
