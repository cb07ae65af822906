"""JSON and weight files, read without running code in them, and directories that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text_tower.fields import TEXT_OF_NAME, field, parse, read_bytes, within

_UNREADABLE = (KeyError, RuntimeError, TypeError)  # of safetensors for a dtype that this PyTorch does not have


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, not JSON, no object, or too large.
    """
    content = read_json_value(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a JSON object")
    return content


def read_json_value(file: Path) -> Any:
    """What a JSON file holds, of any kind; it raises as `read_json` does."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; expected a saved model's directory")
    return parse(read_bytes(file, 2**24), file)


def write_json(content: Mapping[str, Any] | list[Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_weights(directory: Path, stem: str = "model", pickle_stem: str = "pytorch_model") -> dict[str, Tensor]:
    """The tensors of a directory, on the CPU: safetensors first, else a .bin that holds tensors only.

    Either may be one file or shards with an index (`STEM.safetensors.index.json`).

    Raises:
        FileNotFoundError: no such file, or a shard is absent.
        ValueError: a file of another kind, one cut short, or a pickle of more than tensors.
    """
    for name, load in ((f"{stem}.safetensors", _safetensors), (f"{pickle_stem}.bin", _pickle)):
        if (directory / name).is_file():
            return load(directory / name)
        index = directory / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(field(read_json(index), "weight_map", TEXT_OF_NAME, index).values()))
            files = [within(directory, shard, index) for shard in shards]
            absent = [shard for shard, file in zip(shards, files, strict=True) if not file.is_file()]
            if absent:
                raise FileNotFoundError(f"{directory} lacks {', '.join(absent)}, which {index.name} names")
            return {key: tensor for file in files for key, tensor in load(file).items()}
    raise FileNotFoundError(f"{directory} holds no weights; expected {stem}.safetensors (or {pickle_stem}.bin)")


def read_shapes(directory: Path, stem: str = "model", pickle_stem: str = "pytorch_model") -> dict[str, Tensor]:
    """What `read_weights` would read, as tensors on the meta device: shapes without the numbers."""
    if (directory / f"{stem}.safetensors").is_file():
        from safetensors import SafetensorError, safe_open

        file = directory / f"{stem}.safetensors"
        try:
            with safe_open(file, framework="pt") as content:
                return {key: torch.empty(content.get_slice(key).get_shape(), device="meta") for key in content.keys()}  # noqa: SIM118
        except (SafetensorError, *_UNREADABLE) as error:
            raise ValueError(f"{file} is no safetensors file, or is cut short ({error})") from error
    return {name: tensor.to("meta") for name, tensor in read_weights(directory, stem, pickle_stem).items()}


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, *_UNREADABLE) as error:
        raise ValueError(f"{file} is no safetensors file, or is cut short ({error})") from error


def _pickle(file: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a file that is not its own
        raise ValueError(f"{file} is no plain file of tensors, and only those are read ({error})") from error
    tensors = isinstance(weights, dict) and all(isinstance(tensor, Tensor) for tensor in weights.values())
    if not tensors or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{file} holds more than named tensors; expected a state dict")
    if odd := sorted(name for name, tensor in weights.items() if not _is_whole(tensor)):
        raise ValueError(
            f"{file} has {', '.join(odd[:5])} sparse, quantized, or without all their numbers; expected plain tensors"
        )
    return weights


def _is_whole(tensor: Tensor) -> bool:
    """Whether a file has every number of a tensor: a pickle may state any shape over a storage of one number."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def write_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    file.touch()  # safetensors makes files that only their owner may read: this one gets the umask's mode
    mode = file.stat().st_mode
    save_file(on_host, file, {"format": "pt"})  # transformers refuses a file without this
    file.chmod(mode)


def check_keys(expected: Mapping[str, list[int]], weights: Mapping[str, Tensor], where: str) -> None:
    """That `weights` has exactly the expected names and shapes.

    Raises:
        ValueError: it names every key that is missing, unexpected or mis-shaped.
    """
    shared = expected.keys() & weights.keys()
    wrong = {n: (list(weights[n].shape), expected[n]) for n in shared if list(weights[n].shape) != expected[n]}
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "mis-shaped": [f"{n} {found}, expected {want}" for n, (found, want) in sorted(wrong.items())],
        "not of floating point": sorted(f"{n} {weights[n].dtype}" for n in shared if not is_real(weights[n])),
    }
    if any(problems.values()):
        lines = [f"  {len(names)} {kind}: {'; '.join(names)}" for kind, names in problems.items() if names]
        raise ValueError("\n".join([f"the weights in {where} do not fit its config.json:", *lines]))


def is_real(tensor: Tensor) -> bool:
    """Whether weights may be of its dtype: integers would be read without the scales that they need."""
    return tensor.is_floating_point()


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory to fill; what the body wrote is on disk before anything at `path` changes.

    A new or empty `path` then appears in one step. Otherwise each file replaces its namesake; others stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.{os.getpid()}.partial")
    building.mkdir()
    try:
        yield building
        for written in [*building.rglob("*"), building]:
            sync(written)
        if path.is_dir() and any(path.iterdir()):
            for written in building.iterdir():
                written.replace(path / written.name)
            building.rmdir()
            sync(path)
        else:
            building.replace(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Flushes a file, or a directory's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
