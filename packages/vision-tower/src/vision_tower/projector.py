"""A trainable projector after the tower: to a space of another width, or of the same, while the tower stays as it is.

Weights from elsewhere have none, and it is made new beside them, as an adapter is (`lora`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vision_tower.config import VisionTowerConfig
from vision_tower.errors import WeightsError
from vision_tower.lora import add_fresh_adapters, is_adapter, lacks_adapters


def make_projector(config: VisionTowerConfig) -> nn.Module | None:
    """One product, or two with a GELU between them; None if the configuration has no projector."""
    if not config.projector:
        return None
    if not config.projector_hidden:
        return nn.Linear(config.width, config.projector)
    hidden = config.projector_hidden
    return nn.Sequential(nn.Linear(config.width, hidden), nn.GELU(), nn.Linear(hidden, config.projector))


def is_projector(name: str) -> bool:
    """Whether a parameter of a tower belongs to its projector."""
    return name.startswith("projector.")


def brought(tower: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a tower's state dict that weights have to bring: all but an adapter and a projector of which they
    know nothing, which stay new."""
    expected: dict[str, Tensor] = tower.state_dict()
    if lacks_adapters(tower, weights):
        expected = {name: tensor for name, tensor in expected.items() if not is_adapter(name)}
    if not any(map(is_projector, weights)):
        expected = {name: tensor for name, tensor in expected.items() if not is_projector(name)}
    return expected


def add_fresh(tower: nn.Module) -> None:
    """Gives an adapter and a projector that are still on the meta device memory and initial values."""
    add_fresh_adapters(tower)
    for name, module in tower.named_modules():
        if (name == "projector" or is_projector(name)) and isinstance(module, nn.Linear) and module.weight.is_meta:
            module.to_empty(device="cpu")
            module.reset_parameters()


def check_projector(
    config: VisionTowerConfig, stated: Mapping[str, Any], weights: Mapping[str, Tensor], source: object
) -> None:
    """WeightsError if a directory says that there is a projector, and its weights have none."""
    if config.projector and "projector" not in stated and not any(map(is_projector, weights)):
        raise WeightsError(f"{source} lacks the projector that its config.json states; copy or download it again")
