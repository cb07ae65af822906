"""A trainable projector after the tower: to a space of another width, or of the same, while the tower stays as it is.

Weights from elsewhere have none, and it is made new beside them, as an adapter is (`lora`).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vision_tower.config import VisionTowerConfig
from vision_tower.errors import WeightsError
from vision_tower.fields import read_json
from vision_tower.files import write_json, write_weights
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


def without_projector(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a state dict is the tower's own."""
    return {name: tensor for name, tensor in state.items() if not is_projector(name)}


def brought(tower: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a tower's state dict that weights have to bring: all but an adapter and a projector of which they
    know nothing, which stay new."""
    expected: dict[str, Tensor] = tower.state_dict()
    if lacks_adapters(tower, weights):
        expected = {name: tensor for name, tensor in expected.items() if not is_adapter(name)}
    if not any(map(is_projector, weights)):
        expected = without_projector(expected)
    return expected


def add_fresh(tower: nn.Module) -> None:
    """Gives an adapter and a projector that are still on the meta device memory and initial values."""
    add_fresh_adapters(tower)
    for name, module in tower.named_modules():
        if (name == "projector" or is_projector(name)) and isinstance(module, nn.Linear) and module.weight.is_meta:
            module.to_empty(device="cpu")
            module.reset_parameters()


class Dense(NamedTuple):
    """One product of a projector as sentence-transformers' Dense module: its folder, our name of the module, and its
    config.json."""

    folder: str
    module: str
    settings: dict[str, Any]


def denses(config: VisionTowerConfig) -> list[Dense]:
    """The products of a tower's projector, in their order."""
    sides = [config.width, *([config.projector_hidden] if config.projector_hidden else []), config.projector]
    activations = ["activation.GELU"] * (len(sides) - 2) + ["linear.Identity"]
    names = ("projector.0", "projector.2") if config.projector_hidden else ("projector",)
    places = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    found: list[Dense] = []
    for (inputs, outputs), activation, name in zip(pairwise(sides), activations, names, strict=True):
        said: dict[str, Any] = {"in_features": inputs, "out_features": outputs, "bias": True, **places}
        said["activation_function"] = f"torch.nn.modules.{activation}"
        found.append(Dense(f"{len(found) + 1}_Dense", name, said))
    return found if config.projector else []


def write_dense(config: VisionTowerConfig, state: Mapping[str, Tensor], directory: Path) -> None:
    """Writes a folder for each product of a tower's projector."""
    for dense in denses(config):
        folder = directory / dense.folder
        folder.mkdir()
        write_json(dense.settings, folder / "config.json")
        parts = {f"linear.{part}": state[f"{dense.module}.{part}"] for part in ("weight", "bias")}
        write_weights(parts, folder / "model.safetensors")


def with_projector(config: VisionTowerConfig, weights: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The weights in `source`, with those of a projector that `write_dense` wrote beside them.

    Raises:
        WeightsError: a directory says that there is a projector and holds none, or its folders are of another.
    """
    if any(map(is_projector, weights)):
        return weights
    found = dict(weights)
    for dense in denses(config):
        folder = source.parent / dense.folder
        if not folder.is_dir():
            raise WeightsError(f"{source} lacks the projector that its config.json states; copy or download it again")
        if read_json(folder / "config.json") != dense.settings:
            raise WeightsError(f"{folder} is not of the projector that {source.parent} states; copy it again")
        try:
            parts = load_file(folder / "model.safetensors")
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise WeightsError(f"{folder} has no weights to read ({error}); copy or download it again") from error
        found |= {f"{dense.module}.{name.removeprefix('linear.')}": tensor for name, tensor in parts.items()}
    return found
