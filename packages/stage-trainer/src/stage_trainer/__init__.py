"""Trains text-image embedding models in stages, under DeepSpeed; `DualEncoder` is what comes out.

`mteb_model` makes an object for `mteb.evaluate` of any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stage_trainer.commands.mteb import mteb_model
    from stage_trainer.dual_encoder import DualEncoder

__all__ = ["DualEncoder", "mteb_model"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes seconds, and `stage-trainer --help` should not.
    if name == "DualEncoder":
        from stage_trainer.dual_encoder import DualEncoder

        return DualEncoder
    if name == "mteb_model":
        from stage_trainer.commands.mteb import mteb_model

        return mteb_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
