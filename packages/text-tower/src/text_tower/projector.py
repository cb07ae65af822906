"""A trainable projector after the tower: to a space of another width, or of the same, while the tower stays as it is.

Weights from elsewhere have none, and it is made new beside them, as an adapter is (`lora`). Like the text projections
of CLIP and open_clip it has no biases. On the disk it is sentence-transformers' Dense modules, each in a folder of its
own beside the tower's weights, which stay what other libraries know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from text_tower.config import TextTowerConfig
from text_tower.fields import COUNT, field, shown
from text_tower.files import check_keys, read_json, write_json, write_weights

_IDENTITY, _GELU = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.GELU"
_ONLY: dict[str, tuple[Any, ...]] = {
    "bias": (False,),
    "use_residual": (False, None),
    "module_input_name": ("sentence_embedding", None),
    "module_output_name": ("sentence_embedding", None),
}
Reader = Callable[..., dict[str, Tensor]]
"""`files.read_weights` or `files.read_shapes`."""


def make_projector(config: TextTowerConfig) -> nn.Module | None:
    """One product, or two with a GELU between them; None if the configuration has no projector."""
    if not config.projector:
        return None
    if not config.projector_hidden:
        return nn.Linear(config.width, config.projector, bias=False)
    first = nn.Linear(config.width, config.projector_hidden, bias=False)
    return nn.Sequential(first, nn.GELU(), nn.Linear(config.projector_hidden, config.projector, bias=False))


def project(projector: nn.Module | None, pooled: Tensor) -> Tensor:
    """What a projector makes of rows `[N, width]`, at least float32; the rows themselves if there is none."""
    if projector is None:
        return pooled
    projected: Tensor = projector(pooled.to(next(projector.parameters()).dtype))
    return projected.to(torch.promote_types(projected.dtype, torch.float32))


def is_projector(name: str) -> bool:
    """Whether a parameter of a tower belongs to its projector."""
    return name.startswith("projector.")


def without_projector(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a state dict is the tower's own."""
    return {name: tensor for name, tensor in state.items() if not is_projector(name)}


def add_fresh(tower: nn.Module) -> None:
    """Gives a projector that is still on the meta device memory and initial values."""
    for name, module in tower.named_modules():
        if (name == "projector" or is_projector(name)) and isinstance(module, nn.Linear) and module.weight.is_meta:
            module.to_empty(device="cpu")
            module.reset_parameters()


class Dense(NamedTuple):
    """One product of a projector, as sentence-transformers has it: its folder, our name of its weight `[out, in]`, and
    the activation after it."""

    folder: str
    name: str
    inputs: int
    outputs: int
    activation: str


def denses(config: TextTowerConfig) -> list[Dense]:
    """The products of a tower's projector, in their order."""
    width, hidden, out = config.width, config.projector_hidden, config.projector
    if not hidden:
        return [Dense("2_Dense", "projector.weight", width, out, _IDENTITY)] if out else []
    first = Dense("2_Dense", "projector.0.weight", width, hidden, _GELU)
    return [first, Dense("3_Dense", "projector.2.weight", hidden, out, _IDENTITY)]


def write(config: TextTowerConfig, state: Mapping[str, Tensor], directory: Path) -> None:
    """Writes a folder for each product of a tower's projector; nothing of a tower without one."""
    for dense in denses(config):
        folder = directory / dense.folder
        folder.mkdir()
        said = {
            "in_features": dense.inputs,
            "out_features": dense.outputs,
            "bias": False,
            "activation_function": dense.activation,
            "module_input_name": "sentence_embedding",
            "module_output_name": "sentence_embedding",
        }
        write_json(said, folder / "config.json")
        write_weights({"linear.weight": state[dense.name]}, folder / "model.safetensors")


def read(
    config: TextTowerConfig, directory: Path, folders: Sequence[Path] | None, reader: Reader
) -> tuple[TextTowerConfig, dict[str, Tensor]]:
    """The configuration with the projector in a directory, and its weights under our names.

    Args:
        config: the tower's; one that states no projector takes that of the folders.
        folders: of sentence-transformers' Dense modules, in their order; None of a directory that is not its, where
            they are if `config` states a projector.

    Raises:
        FileNotFoundError: a file of theirs is missing.
        ValueError: they are not the projector that `config` states, or have biases or other activations.
    """
    folders = [directory / dense.folder for dense in denses(config)] if folders is None else folders
    if not folders and config.projector:
        raise ValueError(f"modules.json of {directory} lacks the projector that config.json states; copy it again")
    if not folders:
        return config, {}
    said = [_settings(folder / "config.json") for folder in folders]
    outputs = [out for _, out, _ in said]
    width, hidden = outputs[-1], outputs[0] if len(outputs) > 1 else 0
    if config.projector and (config.projector, config.projector_hidden) != (width, hidden):
        raise ValueError(
            f"{directory} has a projector to {config.projector} by its config.json, with "
            f"{config.projector_hidden} hidden units, and Dense modules of {outputs}; copy or download it again"
        )
    try:
        config = replace(config, projector=width, projector_hidden=hidden)
    except ValueError as error:
        raise ValueError(f"{folders[-1]}: {error}") from error
    weights: dict[str, Tensor] = {}
    for folder, dense, (inputs, _, activation) in zip(folders, denses(config), said, strict=True):
        if (inputs, activation) != (dense.inputs, dense.activation):
            raise ValueError(
                f"{folder / 'config.json'} has {inputs} in_features and activation_function {shown(activation)}; "
                f"expected {dense.inputs} and {dense.activation}: one product, or two with a GELU between"
            )
        found = reader(folder)
        check_keys({"linear.weight": [dense.outputs, dense.inputs]}, found, str(folder))
        weights[dense.name] = found["linear.weight"].to(torch.float32, copy=True)
    return config, weights


def _settings(file: Path) -> tuple[int, int, object]:
    """(inputs, outputs, activation) of a Dense module."""
    said = read_json(file)
    for key, allowed in _ONLY.items():
        if (value := said.get(key, True if key == "bias" else None)) not in allowed:
            raise ValueError(f"{file} has {key} {shown(value)}; a projector knows {allowed[0]!r} only")
    if unknown := sorted(said.keys() - _ONLY.keys() - {"in_features", "out_features", "activation_function"}):
        raise ValueError(f"{file} has unknown keys {unknown}; expected sentence-transformers' Dense")
    inputs, outputs = (field(said, key, COUNT, file) for key in ("in_features", "out_features"))
    return inputs, outputs, said.get("activation_function")
